"""The worker's processes: starting them so that none outlives the run, and finding every one of them again."""

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_jet.configs.ranks import RANK_VARIABLES

TOKEN_VARIABLE = "JET_RUN_TOKEN"
_PR_SET_PDEATHSIG = 1


class WorkerProcesses:
    """A worker and all that it starts.

    torchrun puts every rank into a session of its own, so a process group does not hold them together. They all inherit
    one environment variable, and on Linux they are found by it, whoever their parent is by then.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], log_file: Path) -> None:
        """Start `command` with its output appended to `log_file`. Raises OSError when that cannot be opened."""
        self._token = secrets.token_hex(8)
        with open(log_file, "ab") as log:
            self.leader = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, TOKEN_VARIABLE: self._token},
                start_new_session=True,  # Ctrl-C reaches the launcher only, which decides what to pass on
                preexec_fn=_die_with_parent(),
            )

    def poll(self) -> int | None:
        """Return code of the leader (negative: killed by that signal), None while it runs."""
        return self.leader.poll()

    def pids(self) -> list[int]:
        """Every live process of this worker."""
        marker = f"{TOKEN_VARIABLE}={self._token}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if marker in entry.read_bytes().split(b"\0"):
                    found.append(int(entry.parent.name))
            except OSError:
                continue  # ended meanwhile, or another user's
        if not found and self.poll() is None:
            return [self.leader.pid]
        return found

    def ask_to_stop(self, ranks_only: bool) -> None:
        """SIGTERM: save and leave.

        Args:
            ranks_only: spare the leader. torchrun's agent would give its ranks 30 seconds and then kill them; it ends
                by itself once they have saved.
        """
        others = [pid for pid in self.pids() if pid != self.leader.pid]
        _send(others if ranks_only and others else [self.leader.pid], signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to every process."""
        _send(self.pids(), signal.SIGKILL)

    def clean_up(self, grace: float) -> list[int]:
        """End what the leader left behind: SIGTERM, `grace` seconds, SIGKILL. Returns the pids that were left."""
        left = self.pids()
        _send(left, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()
        return left


def worker_environment(nproc: int, root: Path, base: dict[str, str] | None = None) -> dict[str, str]:
    """Environment of the worker: this checkout importable, unbuffered output, threads shared among the ranks."""
    environment = dict(os.environ if base is None else base)
    for name in RANK_VARIABLES:  # of another job's shell; torchrun sets its own
        environment.pop(name, None)
    paths = [str(root), str(root / "kernels"), str(root / "launcher")]
    environment["PYTHONPATH"] = os.pathsep.join(paths + [p for p in (environment.get("PYTHONPATH"),) if p])
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONFAULTHANDLER"] = "1"
    environment["JET_STAGE_LOGS"] = "1"
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    return environment


def worker_command(run_dir: Path, stages: Sequence[str], nproc: int) -> list[str]:
    """Command line of the worker: one warm process for all stages, or torchrun on a free port.

    JET_WORKER names another module to start, such as a profiler's wrapper around megatron_jet.run_stage.
    """
    module = os.environ.get("JET_WORKER", "megatron_jet.run_stage")
    worker = ["-m", module, str(run_dir), *stages]
    if nproc == 1:
        return [sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    return [sys.executable, *torchrun, *worker]


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux the worker gets SIGTERM when the launcher dies; elsewhere it finishes its stage."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) and None


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
