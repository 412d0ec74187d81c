"""All or nothing: the jobs that Slurm has taken while a submission goes on, and taking them back when it fails."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from jet_launcher.signals import Interrupts, shielded_children
from jet_launcher.slurm import state as slurm
from jet_launcher.slurm.ask import number_of, shell_words
from megatron_jet.configs.errors import UserError

PATIENCE = 30.0  # seconds that Slurm gets to end cancelled jobs
POLL_SECONDS = 0.5


class Interrupted(UserError):
    """Somebody wants a submission to stop."""


@dataclass(frozen=True)
class Submitted:
    """What Slurm has taken.

    Attributes:
        experiment: its NeMo-Run ID, for `nemo experiment status|logs|cancel`; None for a job of the plain script.
        home: NEMORUN_HOME that holds it.
        job_ids: Slurm's job ID by job name.
    """

    experiment: str | None
    home: Path | None
    job_ids: dict[str, str]


class Taken:
    """Collects job IDs as they come, from several threads."""

    def __init__(
        self, experiment: str | None, home: Path | None, keep: Callable[[Submitted], None], interrupts: Interrupts
    ) -> None:
        """`keep` is called with all IDs so far whenever one comes."""
        self._experiment, self._home, self._keep = experiment, home, keep
        self._interrupts = interrupts
        self._job_ids: dict[str, str] = {}
        self._tried = False
        self._lock = Lock()

    @property
    def submitted(self) -> Submitted:
        return Submitted(self._experiment, self._home, dict(self._job_ids))

    @contextmanager
    def one_more(self) -> Iterator[Callable[[str, str], None]]:
        """Around one sbatch. Gives what is to be called with the job's name and ID.

        Raises:
            Interrupted: it is time to stop.
        """
        self.check()
        self._tried = True
        with shielded_children():
            yield self._add

    def check(self) -> None:
        """Raise Interrupted once a signal has come."""
        if self._interrupts.count:
            raise Interrupted("interrupted")

    def _add(self, name: str, job_id: str) -> None:
        with self._lock:
            self._job_ids[name] = job_id
            self._keep(self.submitted)

    def take_back(self, ours: Callable[[str], bool], cluster: str = "") -> str:
        """Cancel what was submitted, and look whether it is gone. Returns what became of it.

        Args:
            ours: whether a batch script, with its arguments, is of this submission: to find jobs, too, whose ID never
                arrived here (sbatch ran into a time-out after Slurm had taken the job, or said something else).
            cluster: that was named to sbatch; "" for none.
        """
        return _take_back(list(self._job_ids.values()), ours, cluster) if self._tried else "nothing was submitted"


def _take_back(job_ids: list[str], ours: Callable[[str], bool], cluster: str) -> str:
    found = {number_of(job_id): job_id for job_id in job_ids}
    try:
        with shielded_children():
            for job_id in slurm.jobs_of_command(ours, cluster):
                found.setdefault(number_of(job_id), job_id)
            # Dependents first: one whose dependency ends well in this very moment must not start.
            ids = [found[number] for number in sorted(found, key=int, reverse=True)]
            slurm.cancel_jobs(ids)
            left = _left(ids)
    except UserError as error:
        unknown = error.reason if isinstance(error, slurm.NoAnswer) else str(error)
        if not found:
            return f"whether Slurm has taken a job is not known ({unknown}): look with squeue --me"
        hint = shell_words("scancel", found.values())
        return f"jobs {', '.join(found)} may still be in the queue ({unknown}): {hint}"
    if left:
        return f"jobs {', '.join(map(number_of, left))} are still in the queue: {shell_words('scancel', left)}"
    return f"{len(found)} jobs were taken back" if found else "nothing was submitted"


def _left(ids: list[str]) -> list[str]:
    deadline = time.monotonic() + PATIENCE
    while True:
        states = slurm.query_jobs(ids)
        left = [job_id for job_id in ids if states[job_id].live and states[job_id].word != "COMPLETING"]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(POLL_SECONDS)
