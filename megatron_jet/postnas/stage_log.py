"""Each stage's output in its own log file, also when one warm process runs them all."""

import os
import sys
from pathlib import Path

ENABLED = "JET_STAGE_LOGS"


def redirect_output(stage_dir: Path) -> None:
    """Send stdout and stderr of this process, and of what it starts, to `stage_dir/log.txt` from here on.

    Does nothing unless the launcher asked for it, so that a stage started by hand writes to the terminal. All ranks
    append to one file; every write is a line of its own.
    """
    if os.environ.get(ENABLED) != "1":
        return
    stage_dir.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(stage_dir / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
