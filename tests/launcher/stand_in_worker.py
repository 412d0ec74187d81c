"""Takes the place of megatron_jet.run_stage in launcher tests: same command line, files, signals, exit codes; no torch.

STAND_IN holds comma-separated `stage=behaviour`: `crash` and `error` fail, `die` kills itself with SIGKILL, `wait`
stays for long and saves on SIGTERM, `stuck` ignores SIGTERM, `child` leaves a child process behind, `stubborn` one
that ignores SIGTERM, `quiet` exits 0 without finishing. With several ranks `crash`, `error` and `die` happen on the
last one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from megatron_jet.configs.files import hash_json, write_json
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.run import RunConfig
from megatron_jet.postnas.stage_log import redirect_output

STEPS = 10


class Stop(Exception):
    pass


def on_term(number, frame):
    raise Stop


def write_status(folder, state, seconds, **fields):
    now = datetime.now(UTC).isoformat(timespec="seconds")
    row = {"state": state, "pid": os.getpid(), "host": socket.gethostname(), "updated": now, **fields}
    write_json(folder / "status.json", {**row, "measured": {"seconds": seconds}})


def meet(folder, rank):
    """A barrier by files, so that no rank is done with a stage before the others are in it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    (folder / f"rank{rank}").touch()
    while world > 1 and len(list(folder.glob("rank*"))) < world:
        time.sleep(0.01)


def run_stage(folder, stage, behaviour, rank, digest):
    meet(folder, rank)
    done = json.loads((folder / "progress.json").read_text())["step"] if (folder / "progress.json").exists() else 0
    start, begun = time.monotonic(), time.time()
    for step in range(done, STEPS):
        print(f"{stage} step {step} rank {rank}")
        if rank == 0:
            row = {"step": step, "total_steps": STEPS, "losses": {"kl": 1 / (step + 1)}}
            row |= {"first_step": done, "first_step_at": begun}
            write_status(folder, "running", time.monotonic() - start, **row)
        if step == STEPS // 2:
            misbehave(behaviour, rank)
        time.sleep(0.01)
        if rank == 0:
            write_json(folder / "progress.json", {"step": step + 1})
    (folder / f"finished{rank}").touch()
    while len(list(folder.glob("finished*"))) < int(os.environ.get("WORLD_SIZE", "1")):
        time.sleep(0.01)
    if rank == 0:
        result = {"stage": stage, "inputs_hash": digest, "tokens": STEPS, "measured": {"seconds": 1.0}}
        write_json(folder / "result.json", result)
        write_status(folder, "done", time.monotonic() - start, step=STEPS, total_steps=STEPS)


def misbehave(behaviour, rank):
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1
    if behaviour == "crash" and rank == last:
        raise RuntimeError("planned crash")
    if behaviour == "error" and rank == last:
        raise ValueError("shard train-000003.tar is corrupt; make the data again")
    if behaviour == "die" and rank == last:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "wait":
        time.sleep(600)
    if behaviour == "stuck":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("stuck", flush=True)
        time.sleep(600)
    if behaviour == "child":
        subprocess.Popen(["sleep", "61"], start_new_session=True)
    if behaviour == "stubborn":
        ignore = "trap '' TERM; exec sleep 62"
        subprocess.Popen(["bash", "-c", ignore], start_new_session=True)
        time.sleep(0.3)  # until it does
    if behaviour == "quiet":
        sys.exit(0)


def main():
    signal.signal(signal.SIGTERM, on_term)
    run_dir, stages = Path(sys.argv[1]), sys.argv[2:]
    config = RunConfig.parse(load_yaml(run_dir / "config.yaml"))
    rank = int(os.environ.get("RANK", "0"))
    wanted = dict(item.split("=") for item in os.environ.get("STAND_IN", "").split(",") if item)
    digest = hash_json(config.to_dict())
    for stage in stages:
        folder = run_dir / "stages" / stage
        if (folder / "result.json").exists():
            continue
        redirect_output(folder)
        behaviour = wanted.get(stage, "")
        try:
            run_stage(folder, stage, behaviour, rank, digest)
        except Stop:
            if rank == 0:
                write_status(folder, "interrupted", 1.0, step=3, total_steps=STEPS, message="SIGTERM")
            sys.exit(75)
        except (RuntimeError, ValueError) as error:
            write_status(folder, "failed", 1.0, step=5, total_steps=STEPS, message=f"{type(error).__name__}: {error}")
            raise


if __name__ == "__main__":
    main()
