"""Exit codes of every command, for the shell, the scheduler and whoever waits."""

DONE = 0
FAILED = 1
USAGE = 2
INTERRUPTED = 75  # EX_TEMPFAIL: saved, and worth starting again
