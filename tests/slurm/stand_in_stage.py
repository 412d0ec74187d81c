"""Takes the place of megatron_jet.run_stage in scheduler tests: its arguments, files, signals and exit codes, no torch.

A stage is STEPS steps of a running number; the result is the number after the last one, so that a step done twice, left
out or done by half shows. STAND_IN says how targets behave, `target=behaviour` separated by commas:

    crash@K       exits 1 at step K, always
    crash_once@K  exits 1 at step K the first time
    kill@K        the last process kills itself with SIGKILL at step K the first time
    deaf          does not hear SIGUSR1, and holds as below
    long          takes 400 steps, and in its first attempt no last one before it is stopped
    hold          takes no last step before the run directory has a file `release`
    usage         exits 2
"""

import os
import signal
import sys
import time
from pathlib import Path

from megatron_jet.configs.files import read_json, write_json

STEP_SECONDS = float(os.environ.get("STAND_IN_STEP_SECONDS", "0.2"))
SAVE_SECONDS = float(os.environ.get("STAND_IN_SAVE_SECONDS", "1"))
CHECKPOINT_EVERY = 5
LOST_SECONDS = 30.0  # a process that waits this long for another one gives up, as a collective does


class Worker:
    """One process of a stage."""

    def __init__(self, run_dir: Path, target: str) -> None:
        stage, _, candidate = target.partition(":")
        self.stage = run_dir / "stages" / stage
        self.directory = self.stage / "jobs" / candidate if candidate else self.stage
        self.target, self.release = target, run_dir / "release"
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
        wanted = dict(item.split("=") for item in os.environ.get("STAND_IN", "").split(",") if item)
        self.behaviour, _, at = wanted.get(target, "").partition("@")
        self.at = int(at or -1)
        self.steps = 400 if self.behaviour == "long" else int(os.environ.get("STAND_IN_STEPS", "12"))
        self.holds = self.behaviour in ("hold", "deaf") or (self.behaviour == "long" and self._is_first())
        self.stopped_by = ""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            if not (self.behaviour == "deaf" and number == signal.SIGUSR1):
                signal.signal(number, self._stop)

    def _is_first(self) -> bool:
        """Whether no attempt was here before. However slow those are who watch, they find the first one at work."""
        self.directory.mkdir(parents=True, exist_ok=True)
        marker = self.directory / f"began-{self.rank}"
        first = not marker.exists()
        marker.touch()
        return first

    def _stop(self, number: int, frame: object) -> None:
        self.stopped_by = signal.Signals(number).name

    def run(self) -> int:
        """The stage. Returns the exit code."""
        if (self.directory / "result.json").exists():
            print("already done")
            return 0
        step, value = self._load()
        print(f"{self.target} rank {self.rank}/{self.world} starts at step {step} on {os.environ['SLURMD_NODENAME']}")
        print(f"rendezvous {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", flush=True)
        while step < self.steps:
            self._misbehave(step)
            time.sleep(STEP_SECONDS)
            if self.holds and step == self.steps - 1 and not (self.release.exists() or self.stopped_by):
                continue
            step, value = step + 1, (value * 1103515245 + 12345) % 2**31
            stop = self._agree_to_stop(step)
            if stop or step % CHECKPOINT_EVERY == 0:
                self._save(step, value, slow=bool(stop))
            if stop:
                self._status("interrupted", step, message=f"stopped by {stop}")
                return 75
            self._status("running", step)
        if self.rank == 0:
            result = {"target": self.target, "value": value, "steps": self.steps, "measured": {"seconds": 1.0}}
            result["environment"] = {key: text for key, text in os.environ.items() if key.startswith("HOSTILE_")}
            write_json(self.directory / "result.json", result)
        self._status("done", step)
        return 0

    def _load(self) -> tuple[int, int]:
        saved = sorted((self.directory / "checkpoints").glob("step-*/state.json"))
        if not saved:
            return 0, 1
        state = read_json(saved[-1])
        return state["step"], state["value"]

    def _save(self, step: int, value: int, slow: bool) -> None:
        if self.rank == 0:
            time.sleep(SAVE_SECONDS if slow else 0)
            write_json(
                self.directory / "checkpoints" / f"step-{step:06d}" / "state.json", {"step": step, "value": value}
            )
        self._meet(f"saved-{step}")

    def _status(self, state: str, step: int, **fields: object) -> None:
        if self.rank == 0:
            row = {"state": state, "step": step, "total_steps": self.steps, "losses": {"kl": 1 / (step + 1)}}
            now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
            write_json(self.directory / "status.json", {**row, "updated": now, **fields, "measured": {"seconds": step}})

    def _agree_to_stop(self, step: int) -> str:
        """All stop at the same step, as soon as one of them was asked to."""
        said = self._meet(f"step-{step}", self.stopped_by)
        return next((word for word in said if word), "")

    def _meet(self, where: str, word: str = "") -> list[str]:
        folder = self.directory / "sync" / self.attempt
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{where}.{self.rank}"
        partial.write_text(word)
        partial.rename(folder / f"{where}.{self.rank}")
        deadline = time.monotonic() + LOST_SECONDS + SAVE_SECONDS
        paths = [folder / f"{where}.{rank}" for rank in range(self.world)]
        while not all(path.exists() for path in paths):
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {self.rank}: others did not come to {where}")
            time.sleep(0.02)
        return [path.read_text() for path in paths]

    def _misbehave(self, step: int) -> None:
        if step != self.at and self.behaviour != "usage":
            return
        marker = self.directory / f"misbehaved-{self.rank}"
        first, last = not marker.exists(), self.rank == self.world - 1
        marker.touch()
        if self.behaviour == "usage":
            sys.exit(2)
        if last and (self.behaviour == "crash" or (self.behaviour == "crash_once" and first)):
            self.rank = 0
            self._status("failed", step, message="RuntimeError: planned crash")
            raise RuntimeError("planned crash")
        if last and first and self.behaviour == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(Worker(Path(sys.argv[1]), sys.argv[2]).run())
