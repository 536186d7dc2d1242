"""The processes of a run: how they start together, and what happens when one dies, hangs or differs.

| module | what it is |
| --- | --- |
| startup | `initialize_distributed`: this process becomes one of several that run a JAX program |
| distributed_info | what a process knows after that: its number, how many there are, how it was told |
| meeting | before JAX starts, the processes connect to process 0 over TCP; an error says who is missing |
| addresses, host_claims | host:port taken apart; which process of this host has which process id |
| watchdog | `Watchdog`: what a program calls to say how far it is, and to agree with the others |
| watch_state | what the two threads of a process share: the program's main thread, the watching thread |
| hub, spoke | the watching thread of process 0; that of every other process |
| wire | the messages between them |
| verdicts | the rules by which process 0 says that the run ends |
| progress | how far a process is: at a step, or in a phase |
| agreement | `Disagreement`, and the first value on which two processes differ |
| preemption | SIGTERM: all processes stop before the same step |
| signals | handlers of signals that were set from C; an abort() that waits |
| exit_codes | with what code a process ends, and why |

"Meeting" has two senses. `meeting` is the start-up over TCP, once a run. A meeting of a `Watchdog` (`meet`, `decide`,
`agree`) is a barrier: every process waits there until all have come.

A host hangs. Either its main thread is blocked (device, collective, file) and it reports no new step, or the whole
process is frozen and reports nothing. On every other host the main thread waits in a collective for ever. The watching
threads of all processes that are not frozen go on:

1. `spoke.Spoke.run` on each process sends its `Progress` to process 0 at every beat: 0.2 s, or 1 s above 256 processes.
2. `hub.Hub.run` on process 0 hears them, and asks `verdicts.Judge.verdict` at every beat. `Judge._silence` finds a
   process that says nothing, `Judge._stuck` one whose step does not end while others wait, `Judge._loss` one that died.
3. `hub.Hub._pronounce` sends the verdict to all.
4. `watch_state.WatchState.end_process` on each process prints who was lost, and ends the process with exit code 3
   (`exit_codes.LOST`), whatever its main thread waits for. Process 0 waits up to 2 s for the others to end first.

A frozen process does not end by this: something outside must kill it. If the main thread of process 0 hangs, `hub`
judges it like any process. If process 0 dies, each `spoke` sees its connection end. If process 0 is frozen, each
`spoke` finds the silence by its own clock. The last two end in `Spoke._end_without_hub`, with exit code 3 as well.
"""

from paged_dist.cluster.agreement import Disagreement
from paged_dist.cluster.exit_codes import DISAGREE, FAILED, LOST, PREEMPTED
from paged_dist.cluster.startup import initialize_distributed
from paged_dist.cluster.watchdog import Watchdog

__all__ = ["DISAGREE", "FAILED", "LOST", "PREEMPTED", "Disagreement", "Watchdog", "initialize_distributed"]
