"""Exit codes of every command, for the shell, the scheduler and whoever waits."""

DONE = 0
FAILED = 1
USAGE = 2  # what was asked for cannot be done, whoever asks again; nothing was started
INTERRUPTED = 75  # EX_TEMPFAIL: saved, and worth starting again
