"""A teacher without weights, a stand-in worker without torch, and the launcher called in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cluster_place import TEACHER, ClusterPlace
from launcher.fake_slurm import FakeSlurm

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


@pytest.fixture
def teacher(tmp_path) -> Path:
    """An HF directory with nothing but a config.json: all that the launcher looks at."""
    path = tmp_path / "teacher"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TEACHER))
    return path


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty current directory whose runs use the stand-in worker."""
    path = tmp_path / "work place"  # a space, as users have
    path.mkdir()
    monkeypatch.chdir(path)
    monkeypatch.setenv("JET_WORKER", "stand_in_worker")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.delenv("STAND_IN", raising=False)
    monkeypatch.delenv("JET_RUNS", raising=False)
    return path


@pytest.fixture
def launcher(workplace, capsys):
    """Call the launcher in this process: `launcher("run", "tiny")` -> (exit code, stdout, stderr)."""
    from jet_launcher.cli import main

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def start_launcher(workplace):
    """Start the launcher as a process of its own, for signals. Killed at the end of the test if it still runs."""
    started = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "launcher" / "postnas.py"), *map(str, arguments)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current directory with a cluster."""
    slurm = FakeSlurm(tmp_path / "slurm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", slurm.path)
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "nemo"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "JET_RUNS"))]:
        monkeypatch.delenv(name)
    return ClusterPlace(tmp_path, slurm)
