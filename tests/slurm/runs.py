"""Runs on the test cluster: submit them, wait for their jobs, look at what they left."""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm.overview import JobView, job_views
from jet_launcher.slurm.record import read_record
from megatron_jet.configs.files import read_json, write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
POSTNAS = (sys.executable, str(ROOT / "launcher" / "postnas.py"))
PATIENCE = 300.0  # seconds without any change; the machine may be busy
# All that the launcher looks at; the stand-in loads no weights.
TEACHER = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 448,
    "tie_word_embeddings": True,
}
CLUSTER = {
    "partition": "batch",
    "nodes": 4,
    # Some tests take these two down or need all of one.
    "exclude": "n7,n8",
    "time_limit": "00:20:00",
    "early_warning_seconds": 60,
    "restarts": 1,
    "preflight": {"enabled": False},
}


@dataclass
class Run:
    """A run on the test cluster."""

    path: Path
    environment: dict[str, str]
    submitted: subprocess.CompletedProcess[str] | None = None

    def launcher(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Call `postnas.py`."""
        command = [*POSTNAS, *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=1000, cwd=self.path.parent
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `postnas.py`."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*POSTNAS, *arguments], env=self.environment, text=True, **pipes)

    def views(self) -> dict[str, JobView]:
        """State of every job by name."""
        directory = RunDirectory(self.path)
        record = read_record(directory)
        assert record is not None
        return {view.job.name: view for view in job_views(directory, record)}

    def until(self, condition, what: str, patience: float = PATIENCE) -> dict[str, JobView]:
        """Wait until `condition(views)` holds, for as long as something changes now and then."""
        before, deadline = None, 0.0
        while not condition(views := self.views()):
            now = [(name, v.slurm.word, v.restarts, v.status.step, v.slurm.reason) for name, v in views.items()]
            if now != before:
                before, deadline = now, time.monotonic() + patience
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

    def let_go(self) -> None:
        """Let jobs that hold take their last steps."""
        (self.path / "release").touch()

    def result(self, target: str) -> int:
        """What the stand-in computed."""
        stage, _, candidate = target.partition(":")
        folder = self.path / "stages" / stage
        return read_json((folder / "jobs" / candidate if candidate else folder) / "result.json")["value"]

    def stage_result(self, stage: str) -> dict:
        """result.json of a stage."""
        return read_json(self.path / "stages" / stage / "result.json")

    def attempts(self, name: str) -> str:
        """cluster/attempts of a job."""
        return (self.path / "cluster" / "attempts" / f"{name}.log").read_text()

    def events(self, name: str) -> list[str]:
        """The words of cluster/attempts, oldest first; of ends with the exit code."""
        rows = [line.split() for line in self.attempts(name).splitlines()]
        return [f"end {row[5]}" if row[1] == "end" else row[1] for row in rows]

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


class Submitter:
    """Submits runs from a directory, and sees to it that nothing is left of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: list[Run] = []

    def stand_in(self, stages: str, behaviours: dict[str, str] | None = None, overrides=(), name="run", **more) -> Run:
        """A run of the stand-in: ("stage1,stage2", {"stage1": "crash@3"}, [overrides], cluster fields and options)."""
        teacher = self.folder / "teacher"
        write_json(teacher / "config.json", TEACHER)
        (teacher / "model.safetensors").touch()  # the stand-in reads no weights
        spoken = ",".join(f"{target}={how}" for target, how in (behaviours or {}).items())
        more["env"] = {"STAND_IN": spoken, **more.get("env", {})}
        more = {"setup": [f"export PYTHONPATH={shlex.quote(str(HERE))}"], **more}
        arguments = ("--stages", stages, f"teacher.path={teacher}", *overrides)
        # The stages after the search need its results, unless the recipe knows the architecture.
        recipe = "tiny" if "placement" in stages.split(",") else "tiny_distill"
        return self.submit(recipe, arguments, name, worker="stand_in_stage", **more)

    def submit(self, recipe: str, arguments=(), name="run", worker="megatron_jet.run_stage", wait=False, **cluster):
        """`run RECIPE ARGUMENTS` on a cluster with these fields.

        Args:
            wait: stay until all jobs have ended, and accept any exit code.
        """
        fields = {**CLUSTER, **cluster, "env": {"OMP_NUM_THREADS": "1", **cluster.get("env", {})}}
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(fields))
        keep = {key: value for key, value in os.environ.items() if not key.startswith("POSTNAS_")}
        keep |= {"JET_WORKER": worker, "NEMORUN_HOME": str(self.folder / "nemo")}
        run = Run(self.folder / name, keep)
        self.runs.append(run)
        where = ("--cluster", str(file), "--output", str(run.path), *(["--wait"] if wait else []))
        run.submitted = run.launcher("run", recipe, *where, *arguments, check=not wait)
        return run

    def close(self) -> None:
        """Cancel what still runs. Fails when processes of a run outlive its jobs."""
        for run in self.runs:
            if not (run.path / "cluster" / "experiment.json").exists():
                continue
            run.launcher("cancel", str(run.path), check=False)
            deadline = time.monotonic() + 120
            while run.processes() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not run.processes(), f"{run.path.name} left processes behind"


def expected(steps: int) -> int:
    """The stand-in's number after so many steps."""
    value = 1
    for _ in range(steps):
        value = (value * 1103515245 + 12345) % 2**31
    return value


def slurm_command(*command: str) -> str:
    """Output of a Slurm command."""
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
