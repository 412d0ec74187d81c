"""The test cluster, and `submit`: a run of the stand-in on it."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml

from megatron_jet.configs.files import write_json
from slurm.cluster import Cluster, ClusterError, install
from slurm.runs import Run

HERE = Path(__file__).parent
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


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The cluster that `make test-slurm` started, else one of our own. Requeued jobs do not wait their two minutes."""
    own = None
    if "SLURM_CONF" not in os.environ:
        if "PYTEST_XDIST_WORKER" in os.environ:
            pytest.fail("start a cluster first (tests/slurm/cluster.py), or run without -n")
        try:
            install()
            own = Cluster(Path("/tmp") / f"slurm-{os.getpid()}", nodes=8)
            own.start()
        except (ClusterError, OSError, subprocess.CalledProcessError) as error:
            pytest.fail(f"no Slurm: {error}")
    over = threading.Event()
    thread = threading.Thread(target=_hurry, args=(over,), daemon=True)
    thread.start()
    yield
    over.set()
    thread.join()
    if own is not None:
        own.stop()
        del os.environ["SLURM_CONF"]


def _hurry(over: threading.Event) -> None:
    while not over.wait(1.0):
        listed = subprocess.run(["squeue", "-h", "-t", "PD", "-o", "%i %r"], capture_output=True, text=True).stdout
        for line in listed.splitlines():
            if line.endswith("BeginTime"):
                subprocess.run(["scontrol", "update", f"JobId={line.split()[0]}", "StartTime=now"], capture_output=True)


@pytest.fixture
def submit(slurm, tmp_path):
    """Submit a run of the stand-in: submit("stage1,stage2", {"stage1": "crash@3"}, [overrides], cluster fields...)."""
    started: list[Run] = []

    def go(
        stages: str,
        behaviours: dict[str, str] | None = None,
        overrides=(),
        name="run",
        wait=False,
        environment=None,
        **cluster,
    ) -> Run:
        teacher = tmp_path / "teacher"
        write_json(teacher / "config.json", TEACHER)
        fields = {
            "partition": "batch",
            "nodes": 4,
            "time_limit": "00:20:00",
            "early_warning_seconds": 60,
            "restarts": 1,
            "setup": [f"export PYTHONPATH={HERE}"],
            "preflight": {"enabled": False},
            **cluster,
        }
        spoken = ",".join(f"{target}={how}" for target, how in (behaviours or {}).items())
        fields["env"] = {"OMP_NUM_THREADS": "1", "STAND_IN": spoken, **fields.get("env", {})}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(fields))
        keep = {k: v for k, v in os.environ.items() if not k.startswith("POSTNAS_")}
        keep |= {"JET_WORKER": "stand_in_stage", "NEMORUN_HOME": str(tmp_path / "nemo"), **(environment or {})}
        run = Run(tmp_path / name, keep)
        started.append(run)
        extra = [f"teacher.path={teacher}", *overrides, *(["--wait"] if wait else [])]
        run.submitted = run.launcher(
            "run", "tiny", "--cluster", str(file), "--output", str(run.path), "--stages", stages, *extra, check=not wait
        )
        return run

    yield go
    for run in started:
        if (run.path / "cluster" / "experiment.json").exists():
            run.launcher("cancel", str(run.path), check=False)
            deadline = time.monotonic() + 20
            while run.processes() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not run.processes(), f"{run.path.name} left processes behind"
