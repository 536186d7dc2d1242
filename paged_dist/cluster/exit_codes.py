"""The exit codes with which the processes of a run end."""

FAILED = 1  # of a process that failed itself
LOST = 3  # of one that ends because another was lost, stuck or failed
DISAGREE = 4  # of all, where they were started differently or went apart
PREEMPTED = 75  # of all, after SIGTERM: sysexits' EX_TEMPFAIL, start it again
