"""tools/bench_gpu.sh and bench_cpu.sh: each part is called with arguments its tool takes, and a failure is named."""

import os
import shlex
import subprocess
from pathlib import Path

from evaluation.tools import ROOT, load_tool

STAND_IN = """#!/bin/sh
case "$1" in
-c) case "$2" in *get_device_name*) echo "${STAND_IN_GPU-}"; [ -n "${STAND_IN_GPU-}" ] ;; *) exit 1 ;; esac ;;
*) echo "$@" >> "$STAND_IN_LOG"; case "$1" in *bench_kernels*) exit 1 ;; esac ;;
esac
"""


def run(
    tmp_path: Path, script: str, *options: str, **environment: str
) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """The script with a stand-in for python: its result, and the tools' arguments. The kernels' benchmark fails."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    log = tmp_path / "calls"
    log.touch()
    settings = {"PY": str(python), "STAND_IN_LOG": str(log), **environment}
    result = subprocess.run(
        ["bash", str(ROOT / "tools" / script), *options, str(tmp_path / "out")],
        env={"PATH": os.environ["PATH"], **settings},
        capture_output=True,
        text=True,
    )
    return result, [shlex.split(line) for line in log.read_text().splitlines()]


def check_arguments(calls: list[list[str]]) -> None:
    for tool, *arguments in calls:
        load_tool(tool.removeprefix("tools/").removesuffix(".py")).parse_arguments(
            arguments
        )  # exits on arguments that it does not know


def test_gpu_script_takes_minutes_unless_asked_for_all(tmp_path):
    """Without an option, no batch search and no full prefill of large batches: those take hours."""
    for options in ((), ("--quick",)):
        result, calls = run(tmp_path, "bench_gpu.sh", *options, STAND_IN_GPU="NVIDIA H100 80GB HBM3")
        check_arguments(calls[-4:])
        tools = [Path(call[0]).stem for call in calls[-4:]]
        assert tools == ["speed", "bench_kernels", "bench_training", "bench_training"]
        assert "hours" not in result.stderr and "failed: kernels" in result.stderr
    result, calls = run(tmp_path, "bench_gpu.sh", "--ful", STAND_IN_GPU="NVIDIA H100 80GB HBM3")
    assert result.returncode == 2 and result.stderr.startswith("error: --ful: give --quick")


def test_gpu_script_measures_every_pair_and_names_what_failed(tmp_path):
    result, calls = run(tmp_path, "bench_gpu.sh", "--full", STAND_IN_GPU="NVIDIA H100 80GB HBM3", CONTEXTS="4096,65536")
    check_arguments(calls)
    pairs = [(call[2], call[4]) for call in calls if call[0] == "tools/throughput.py"]
    assert pairs == [(f"Jet-Nemotron-{size}", peer) for size in ("2B", "4B") for peer in ("Qwen3-1.7B", "Qwen2.5-1.5B")]
    outputs = [call[call.index("--output") + 1] for call in calls]
    assert outputs[0] == f"{tmp_path}/out/nvidia-h100-80gb-hbm3-jet-nemotron-2b-qwen3-1_7b.json"
    assert len(set(outputs)) == len(outputs) == 7
    assert all("4096,65536" in call for call in calls[:4])
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == "failed: kernels"
    assert result.stderr.index("13 hours") < result.stderr.index("== Jet-Nemotron")  # said before it starts


def test_gpu_script_without_a_gpu_says_so(tmp_path):
    result, calls = run(tmp_path, "bench_gpu.sh")
    assert result.returncode == 1 and not calls
    assert result.stderr.startswith("error: torch sees no GPU here") and len(result.stderr.splitlines()) == 1


def test_cpu_script(tmp_path):
    result, calls = run(tmp_path, "bench_cpu.sh")
    check_arguments(calls)
    assert [Path(call[0]).stem for call in calls][-3:] == ["throughput", "bench_kernels", "bench_training"]
    for call in calls:
        for argument in call:
            assert not argument.startswith("docs/benchmarks/configs") or (ROOT / argument).is_file()
    assert result.returncode == 1 and "failed: kernels" in result.stderr
