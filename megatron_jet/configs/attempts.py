"""Attempts of one Slurm job: which one counts, when the one before it was thought dead and is not.

slurm/job.sh writes a `start` line per attempt into cluster/attempts/JOB.log. The last one counts; a process of an
earlier attempt leaves before it writes anything more.
"""

import os
from pathlib import Path

from megatron_jet.configs.signals import Interrupted


class SupersededError(Interrupted):
    """Another attempt at this work has started since: this process writes nothing any more, and leaves."""


def fenced() -> bool:
    """Whether this process belongs to an attempt of a job, so that a later one stops it."""
    return all(os.environ.get(name) for name in ("POSTNAS_RUN_DIR", "POSTNAS_JOB", "SLURM_JOB_ID"))


def superseded() -> str | None:
    """Words for the attempt that took over from the one this process belongs to; None: nobody did, or no job."""
    if not fenced():
        return None
    log = Path(os.environ["POSTNAS_RUN_DIR"]) / "cluster" / "attempts" / f"{os.environ['POSTNAS_JOB']}.log"
    try:
        rows = [line.split() for line in log.read_text(errors="replace").splitlines()]
    except OSError:
        return None
    starts = [(row[2], row[3]) for row in rows if len(row) >= 4 and row[1] == "start"]
    own = (os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT") or "0")
    if own not in starts or starts[-1] == own:
        return None
    job, restart = starts[-1]
    return f"attempt {restart} of job {job} has taken over from attempt {own[1]} of job {own[0]}"


def leave_if_superseded() -> None:
    """Raise SupersededError where another attempt has taken over."""
    by = superseded()
    if by is not None:
        raise SupersededError(by)
