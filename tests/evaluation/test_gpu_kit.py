"""tools/gpu: the run on a GPU machine, rehearsed on this CPU with tiny models."""

import json
import os
import subprocess
import sys

import pytest

from evaluation.tools import ROOT


@pytest.mark.parametrize(
    "broken, named",
    [
        ("nothing", []),
        ("env.py", ["env"]),
        ("-k bfloat16", ["tests (tests/kernels/test_triton_kernels.py -k bfloat16)"]),
        ("bench_kernels.py", ["kernels"]),
        ("train.py", ["train-stage1", "train-stage2", "train-stage1-recomputed"]),
        ("postnas.py", ["quickstart"]),
    ],
)
def test_what_fails_is_named_and_the_rest_runs(tmp_path, broken, named):
    """A Python that does nothing but fail at one thing: no part that fails may look like a finished run."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\ncase "$*" in *"{broken}"*) exit 3;; esac\necho \'"torch": "\'\n')
    stand_in.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("PARTS", "TOTAL", "LIMIT")}
    settings = {"JET_GPU_DRY": "1", "PYTHON": str(stand_in), "WORK": str(tmp_path), "OUT": str(tmp_path / "out")}
    settings |= {"PACK": str(tmp_path / "none"), "TOTAL": "3600", "LIMIT": "1500"}
    settings |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "timeout").write_text(f'#!/bin/sh\necho "$2" >> "{tmp_path}/limits"; shift 2; exec "$@"\n')
    (tmp_path / "timeout").chmod(0o755)
    command = ["bash", str(ROOT / "tools/gpu/measure.sh")]
    done = subprocess.run(command, env=kept | settings, capture_output=True, text=True)
    failed = [line.removeprefix("== failed: ") for line in done.stdout.splitlines() if line.startswith("== failed: ")]
    assert (failed, done.returncode) == (named, 1 if named else 0), done.stdout + done.stderr
    for part in ("env", "defaults", "kernels", "train-stage1", "speed", "train-stage2", "quickstart"):
        assert f"== {part}: exit code " in done.stdout
    limits = (tmp_path / "limits").read_text().split()
    assert len(limits) == 12 and set(limits) == {"1500"}, "a rehearsal's own limit, for eight parts and four tests"


@pytest.mark.timeout(1800)
def test_measure_rehearsed(tmp_path):
    """No pack, no GPU: what can be imported here is, and every row of the speed table has a figure."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PARTS", "TOTAL", "TRITON_PTXAS_PATH")}
    settings = {
        "JET_GPU_DRY": "1",
        "PYTHON": sys.executable,
        "WORK": str(tmp_path / "work"),
        "OUT": str(tmp_path / "out"),
    }
    settings |= {"PACK": str(tmp_path / "none"), "PARTS": "env speed", "TOTAL": "3600", "LIMIT": "1500"}
    done = subprocess.run(
        ["bash", str(ROOT / "tools/gpu/measure.sh")], env=kept | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "out" / "speed.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["decode"] * 5 + ["prefill"] * 4
    assert all(row["tokens_per_second"] > 0 and "error" not in row for row in rows)
    assert json.loads((tmp_path / "out" / "env.json").read_text())["versions"]["torch"]
    defaults = list((tmp_path / "work" / "fla_configs").glob("*.json"))
    assert len(defaults) > 20  # one configuration for each kernel that fla would tune


def test_a_damaged_pack_is_one_line(tmp_path):
    (tmp_path / "pack.tar.xz").write_bytes(b"\xfd7zXZ\0cut off")
    settings = {"PACK": str(tmp_path / "pack.tar.xz"), "WORK": str(tmp_path / "work"), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "tools/gpu/measure.sh")]
    done = subprocess.run(command, env=os.environ | settings | {"OUT": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and len((done.stdout + done.stderr).splitlines()) == 1
    assert "pack.tar.xz does not unpack; make it again" in done.stdout + done.stderr
