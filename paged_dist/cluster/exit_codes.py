"""The exit codes with which the processes of a run end."""

FAILED = 1  # of a process that failed itself
LOST = 3  # of those that end because one was lost, stuck or failed; of the stuck one too
DISAGREE = 4  # of all, where they were started differently or went apart
PREEMPTED = 75  # of all, after SIGTERM: sysexits' EX_TEMPFAIL, start it again
