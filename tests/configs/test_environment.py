"""What is said of an environment whose packages cannot run the project."""

import importlib.metadata
import importlib.util

import pytest

from jet_kernels import hopper
from megatron_jet.configs import environment
from megatron_jet.configs.mixers.gla import GLAConfig
from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.recipes.tiny import tiny


@pytest.fixture
def installed(monkeypatch):
    """Decides which versions seem installed."""
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    versions = {"megatron-core": environment.SUPPORTED_MEGATRON, "torch": "2.11.0", "triton": "3.6.0", "fla": "0.6.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in versions else None)
    return versions


def test_only_the_checked_megatron_is_accepted(installed):
    assert environment.megatron_problem() is None
    installed["megatron-core"] = "0.20.0"
    assert "megatron-core 0.20.0 is installed, 0.19.2 is needed" in environment.megatron_problem()
    del installed["megatron-core"]
    assert "not installed" in environment.megatron_problem()


@pytest.mark.parametrize(
    ("triton", "capability", "kernels", "refused"),
    [
        ("3.3.1", "9.0", "auto", False),
        ("3.4.0", "9.0", "auto", True),
        ("3.6.0", "9.0", "auto", True),
        ("3.7.0", "9.0", "auto,chunk_gla=reference", True),
        ("3.7.1", "9.0", "auto", False),
        ("3.6.0", "8.0", "auto", False),
        ("3.6.0", "10.0", "auto", False),
        ("3.6.0", "9.0", "auto, chunk_gated_delta_rule=reference", False),
        ("3.6.0", "9.0", "reference", False),
    ],
)
def test_triton_that_miscompiles_the_backward_is_refused_on_hopper(installed, triton, capability, kernels, refused):
    installed["triton"] = triton
    problem = environment.triton_problem(capability, kernels)
    assert (problem is not None and f"triton {triton} cannot train" in problem) == refused


def test_tilelang_is_a_way_out_where_fla_takes_it(installed, tmp_path, monkeypatch):
    """It compiles with nvcc; without one, or switched off, fla would raise in the first backward pass."""
    monkeypatch.setattr(hopper, "CUDA_FOLDER", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", "FLA_TILELANG"):
        monkeypatch.delenv(name, raising=False)
    installed["tilelang"] = "0.1.15"
    assert "cannot train" in environment.triton_problem("9.0", "auto")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert environment.triton_problem("9.0", "auto") is None
    monkeypatch.setenv("FLA_TILELANG", "0")
    assert "cannot train" in environment.triton_problem("9.0", "auto")


@pytest.mark.parametrize(
    ("release", "problem"),
    [("13.5", None), ("13.3", None), ("13.2", "is version 13.2"), ("12.8", "is version 12.8"), ("", "does not run")],
)
def test_a_current_ptxas_is_a_way_out(installed, tmp_path, monkeypatch, release, problem):
    """Also where the package brings it; what TRITON_PTXAS_PATH names comes first, and is not passed over in silence."""
    (tmp_path / "bin").mkdir()
    ptxas = fake_ptxas(tmp_path / "bin" / "ptxas", release)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas))
    found = environment.triton_problem("9.0", "auto")
    assert found is None if problem is None else problem in found and "unset it and pip install" in found

    monkeypatch.delenv("TRITON_PTXAS_PATH")
    assert "pip install 'nvidia-cuda-nvcc>=13.3'" in environment.triton_problem("9.0", "auto")
    (tmp_path / "nvidia_cuda_nvcc-1.dist-info").mkdir()
    (tmp_path / "nvidia_cuda_nvcc-1.dist-info" / "METADATA").write_text("Name: nvidia-cuda-nvcc\nVersion: 1\n")
    (tmp_path / "nvidia_cuda_nvcc-1.dist-info" / "RECORD").write_text("bin/ptxas,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = environment.triton_problem("9.0", "auto")
    assert found is None if problem is None else problem in found and str(ptxas) in found


def fake_ptxas(path, release: str):
    """A program that calls itself this release; a file that does not run for an empty one."""
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755 if release else 0o644)
    return path


def test_fla_must_be_free_to_take_our_kernel(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(fake_ptxas(tmp_path / "ptxas", "13.5")))
    monkeypatch.setenv("FLA_DISABLE_BACKEND_DISPATCH", "1")
    assert "unset it" in environment.triton_problem("9.0", "auto")


def test_a_run_without_the_delta_rule_does_not_mind(installed, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(tiny()))
    assert "cannot train" in environment.run_problem(tmp_path, "9.0", "auto")
    assert environment.run_problem(tmp_path, None, "auto") is None
    plain = {stage: getattr(tiny(), stage).replace(candidates=("gla",)) for stage in ("block_selection", "new_block")}
    plain["placement"] = tiny().placement.replace(linear="gla")
    only_gla = tiny().replace(mixers={"gla": GLAConfig(num_heads=2, head_dim=8)}, **plain)
    (tmp_path / "config.yaml").write_text(dump_yaml(only_gla))
    assert environment.run_problem(tmp_path, "9.0", "auto") is None
