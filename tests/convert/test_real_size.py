"""A 2B model in its published shapes goes to a Megatron checkpoint and back: memory, speed, and every bit.

About 15 GB of disk and some minutes. The figures are printed with `pytest -s`; docs/conversion.md has them.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

ROOT = Path(__file__).parents[2]
MODEL = "Jet-Nemotron-2B"
SHARD_BYTES = 2_000_000_000
PEAK_MIB = 3 * 1024
ROUNDS = 4  # of which the best counts: a busy machine is slow in any of them


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """On the checkout's own disk: /tmp may be memory."""
    (ROOT / ".cache").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache", prefix="real-size-") as path:
        yield Path(path)


def run(step: str, *arguments) -> dict[str, float]:
    """One step in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("real_size_steps.py")), step, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_2b_model_there_and_back(directory):
    hf, checkpoint, back, copy = (directory / name for name in ("hf", "checkpoint", "back", "copy"))
    run("write", MODEL, hf, SHARD_BYTES)
    mib = sum(path.stat().st_size for path in hf.glob("*.safetensors")) / 2**20
    assert mib > 3700 and len(list(hf.glob("*.safetensors"))) > 1
    steps = {"plain": (hf, copy), "import": (hf, checkpoint), "export": (checkpoint, back)}
    best: dict[str, float] = {}
    for number in range(ROUNDS):
        for step, paths in steps.items():
            found = run(step, *paths)
            best[step] = min(best.get(step, float("inf")), found["seconds"])
            print(
                f"\nround {number} {step:6} {mib / found['seconds']:6.0f} MiB/s  {found['seconds']:5.1f} s, "
                f"{found['cpu_seconds']:4.1f} s of CPU, peak {found['peak_mib']:.0f} MiB",
                end="",
            )
            assert step == "plain" or found["peak_mib"] <= PEAK_MIB
        ratios = {step: best["plain"] / best[step] for step in ("import", "export")}
        if number > 0 and min(ratios.values()) >= 0.5:
            break
    print("\nof the speed of a plain copy: " + ", ".join(f"{step} {ratio:.0%}" for step, ratio in ratios.items()))
    run("compare", hf, back)
    assert json.loads((back / "config.json").read_text())["efficient_attention_config"]["jet"]["norm_eps"] == "1e-5"
    assert min(ratios.values()) >= 0.5
