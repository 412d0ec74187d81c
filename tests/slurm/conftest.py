"""The test cluster, and `submit`: a run of the stand-in on it."""

import os
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from slurm.cluster import Cluster, ClusterError, install
from slurm.runs import Submitter


def pytest_collection_modifyitems(items):
    """The longest test first, so that it does not start when the others have ended."""
    items.sort(key=lambda item: "test_real_runs" not in item.nodeid)


@pytest.fixture(scope="session")
def slurm():
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
    """Let requeued jobs start a little later instead of two minutes later.

    Not at once: a node refuses the job for as long as its clock shows the second in which the last attempt was ended.
    """
    while not over.wait(1.0):
        listed = subprocess.run(["squeue", "-h", "-t", "PD", "-o", "%i %r %S"], capture_output=True, text=True).stdout
        for line in listed.splitlines():
            job, reason, start = line.split(maxsplit=2)
            if reason == "BeginTime" and start != "N/A" and seconds_until(start) > 10:
                subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"], capture_output=True)


def seconds_until(moment: str) -> float:
    """From now, of a time as Slurm prints it."""
    return datetime.fromisoformat(moment).timestamp() - time.time()


@pytest.fixture
def submitter(slurm, tmp_path):
    """Runs in the test's own directory."""
    own = Submitter(tmp_path)
    yield own
    own.close()


@pytest.fixture
def submit(submitter):
    """Submit a run of the stand-in; see `Submitter.stand_in`."""
    return submitter.stand_in
