"""A run on the test cluster: call the launcher on it, wait for its jobs, look at what they left."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm.overview import JobView, job_views
from jet_launcher.slurm.record import read_record
from megatron_jet.configs.files import read_json

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0  # seconds; the machine may be busy


@dataclass
class Run:
    """A run on the test cluster."""

    path: Path
    environment: dict[str, str]
    submitted: subprocess.CompletedProcess[str] | None = None

    def launcher(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Call `postnas.py`."""
        command = [sys.executable, str(ROOT / "launcher" / "postnas.py"), *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=600, cwd=self.path.parent
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def views(self) -> dict[str, JobView]:
        """State of every job by name."""
        directory = RunDirectory(self.path)
        record = read_record(directory)
        assert record is not None
        return {view.job.name: view for view in job_views(directory, record)}

    def until(self, condition, what: str, patience: float = PATIENCE) -> dict[str, JobView]:
        """Wait until `condition(views)` holds."""
        deadline = time.monotonic() + patience
        while not condition(views := self.views()):
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: " + "; ".join(f"{n} {v.state} {v.slurm.word} {v.note}" for n, v in views.items()))
            time.sleep(0.5)
        return views

    def until_over(self, patience: float = PATIENCE) -> dict[str, JobView]:
        """Wait until no job is left in the queue."""
        return self.until(lambda views: not any(v.slurm.live for v in views.values()), "jobs did not end", patience)

    def until_step(self, name: str, step: int = 1) -> JobView:
        """Wait until a running job has done some steps of this attempt."""

        def there(views: dict[str, JobView]) -> bool:
            view = views[name]
            return view.state == "running" and view.status.state == "running" and view.status.step >= step

        return self.until(there, f"{name} did not reach step {step}")[name]

    def result(self, target: str) -> int:
        """What the stand-in computed."""
        stage, _, candidate = target.partition(":")
        folder = self.path / "stages" / stage
        return read_json((folder / "jobs" / candidate if candidate else folder) / "result.json")["value"]

    def stage_result(self, stage: str) -> dict:
        """result.json of a stage."""
        return read_json(self.path / "stages" / stage / "result.json")

    def events(self, name: str) -> list[str]:
        """The words of cluster/attempts, oldest first."""
        lines = (self.path / "cluster" / "attempts" / f"{name}.log").read_text().splitlines()
        return [" ".join([line.split()[1], *line.split()[5:6]]) if "end" in line else line.split()[1] for line in lines]

    def processes(self) -> list[int]:
        """Processes of this run that are alive."""
        marker = f"POSTNAS_RUN_DIR={self.path}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if marker in entry.read_bytes().split(b"\0"):
                    found.append(int(entry.parent.name))
            except OSError:
                continue
        return found


def expected(steps: int) -> int:
    """The stand-in's number after so many steps."""
    value = 1
    for _ in range(steps):
        value = (value * 1103515245 + 12345) % 2**31
    return value


def slurm_command(*command: str) -> str:
    """Output of a Slurm command."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
