"""The processes of a run: how they start together, and what happens when one dies, hangs or differs.

| module | what it is |
| --- | --- |
| startup | `initialize_distributed`: this process becomes one of several that run a JAX program |
| distributed_info | what a process knows after that: its number, how many there are, how it was told |
| meeting | before JAX starts, the processes meet over TCP; an error says who is missing |
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

A host hangs. Its main thread stops (in a device, a collective, a file), so that its process says no new step, or the
whole process says nothing. On every other host the main thread waits in a collective for ever. The watching threads
go on:

1. `spoke.Spoke.run` on each process sends its `Progress` to process 0 at every beat, about 0.2 s.
2. `hub.Hub.run` on process 0 hears them, and asks `verdicts.Judge.verdict` at every beat. `Judge._silence` finds a
   process that says nothing, `Judge._stuck` one whose step does not end while others wait, `Judge._loss` one that died.
3. `hub.Hub._pronounce` sends the verdict to all.
4. `watch_state.WatchState.end_process` on each process prints who was lost, and ends the process with exit code 3
   (`exit_codes.LOST`), whatever its main thread waits for.

Where process 0 itself hangs or dies, each `spoke` finds that by its own clock and ends its process the same way.
"""

from paged_dist.cluster.agreement import Disagreement
from paged_dist.cluster.exit_codes import DISAGREE, FAILED, LOST, PREEMPTED
from paged_dist.cluster.startup import initialize_distributed
from paged_dist.cluster.watchdog import Watchdog

__all__ = ["DISAGREE", "FAILED", "LOST", "PREEMPTED", "Disagreement", "Watchdog", "initialize_distributed"]
