"""The Triton kernels against the references: interpreted on a CPU, compiled for sm_90, and run on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONV = [
    "conv_dense",
    "conv_packed",
    "conv_packed_state",
    "conv_width_2",
    "conv_width_3",
    "conv_decode",
    "conv_limited",
]
FLA = [
    "delta_rule_chunk",
    "delta_rule_chunk_packed",
    "delta_rule_recurrent",
    "gla_chunk",
    "gla_chunk_packed",
    "gla_recurrent",
    "short_conv",
    "short_conv_short",
    "short_conv_packed",
    "norms",
    "naive",
    "hopper_16",
    "hopper_32",
    "hopper_64",
    "hopper_96x256",
]
# The published heads in full: Jet-Nemotron-2B and 4B.
GPU_ONLY = ["hopper_128x256", "delta_rule_96x256", "delta_rule_128x256"]
# Largest share of the shared memory of an H100 block that a launch may ask for.
SHARED_MEMORY = 232448


def run_script(name, *arguments, **environment):
    """Runs a helper script in its own process, because it patches Triton, and reads its JSON."""
    path = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / name), *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check(report, tolerance):
    assert "failed" not in report, report["failed"]
    print(f"{report['seconds']:.1f} s, errors {report['errors']}")
    wrong = {name: ratio for name, ratio in report["errors"].items() if not ratio < tolerance}
    assert not wrong, f"error ratios above {tolerance}: {wrong}"


@pytest.fixture(scope="module")
def interpreted():
    return run_script("kernel_cases.py", "--device", "cpu", TRITON_INTERPRET="1")


# fp32 throughout, sums of at most a few hundred products: sqrt(300) * 6e-8 is 1e-6.
@pytest.mark.parametrize("case", CONV)
def test_conv_interpreted(interpreted, case):
    check(interpreted[case], 1e-6)


# fla evaluates exponents in base 2 and keeps running sums of the decay in fp32.
@pytest.mark.parametrize("case", FLA)
def test_fla_interpreted(interpreted, case):
    check(interpreted[case], 3e-6)


def test_conv_saves_no_kernels_for_the_backward(interpreted):
    check(interpreted["conv_saved_bytes"], 1 + 1e-9)


def test_all_cases_are_checked(interpreted):
    assert set(interpreted) == {*CONV, *FLA, "conv_saved_bytes"}


def test_conv_compiles_for_sm_90(tmp_path):
    kernels = run_script("compile_kernels.py", "conv", TRITON_CACHE_DIR=str(tmp_path))["kernels"]
    print(*kernels, sep="\n")
    names = {kernel["kernel"] for kernel in kernels}
    assert names == {"dynamic_conv_forward_kernel", "dynamic_conv_dx_kernel", "dynamic_conv_dkernel_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["spills"] == 0, kernel
        matrix_products = "dkernel" not in kernel["kernel"] and "decode" not in kernel["case"]
        assert (kernel["hgmma"] > 0) == matrix_products, kernel


def test_the_backward_kernel_for_hopper_compiles_for_sm_90(tmp_path):
    """Also at the width that fla would give tiles of 64. The published heads take the same tiles."""
    kernels = run_script("compile_kernels.py", "hopper", TRITON_CACHE_DIR=str(tmp_path))["kernels"]
    print(*kernels, sep="\n")
    assert [(kernel["case"], kernel["key_tile"]) for kernel in kernels] == [("32", 32), ("64", 128)]
    for kernel in kernels:
        assert kernel["kernel"] == "chunk_bwd_kernel_dqkwg" and kernel["shared"] <= SHARED_MEMORY, kernel


@pytest.mark.slow
def test_fla_compiles_for_sm_90(tmp_path):
    report = run_script("compile_kernels.py", "fla", TRITON_CACHE_DIR=str(tmp_path))
    print(*report["kernels"], sep="\n")
    for case in ("2B", "4B"):
        names = {kernel["kernel"]: kernel for kernel in report["kernels"] if kernel["case"] == case}
        assert any("fwd" in name for name in names) and names["chunk_bwd_kernel_dqkwg"]["key_tile"] == 128
    assert all(kernel["shared"] <= SHARED_MEMORY for kernel in report["kernels"])


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def on_gpu(request):
    return request.param, run_script("kernel_cases.py", "--device", "cuda", "--dtype", request.param)


# bf16 rounds at 2^-8 = 0.004; gradients pass through several roundings. fla's own tests allow 0.02 for g and beta.
# fp32 products inside fla's kernels are TF32, 2^-11.
@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CONV, *FLA, *GPU_ONLY])
def test_kernel_on_a_gpu(on_gpu, case):
    dtype, report = on_gpu
    check(report[case], {"float32": 1e-6 if case in CONV else 5e-3, "bfloat16": 2e-2}[dtype])


@pytest.mark.gpu
def test_conv_saves_no_kernels_on_a_gpu(on_gpu):
    check(on_gpu[1]["conv_saved_bytes"], 1 + 1e-9)
