"""Which backend an operation gets, and that a missing one is an error and never a silent change."""

import ast
import importlib.util
import inspect
import logging
import os
import sys
from pathlib import Path

import pytest
import torch

import jet_kernels.hopper
from jet_kernels import dispatch
from jet_kernels.dynamic_conv.reference import dynamic_causal_conv
from jet_kernels.gated_delta_rule import reference as gated_delta_rule
from jet_kernels.gla import reference as gla
from jet_kernels.norm_gate import reference as norm_gate
from jet_kernels.short_conv import reference as short_conv

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REFERENCES = sorted(Path(jet_kernels.__path__[0]).glob("*/reference.py"))


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.delenv("JET_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.fixture
def packages(monkeypatch):
    """Decides which packages seem installed."""
    present = {"triton", "fla"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in present else None)
    return present


def test_auto_takes_the_fast_backend_on_a_gpu_only(packages):
    assert dispatch.backend("chunk_gated_delta_rule", CPU) == "reference"
    assert dispatch.backend("chunk_gated_delta_rule", CUDA) == "fla"
    assert dispatch.backend("fused_dynamic_conv", CUDA) == "triton"
    assert dispatch.backend("dynamic_causal_conv", CUDA) == "reference"


def test_environment_overrides_all_or_one(packages, monkeypatch):
    monkeypatch.setenv("JET_KERNELS", "reference")
    assert dispatch.backend("chunk_gla", CUDA) == "reference"
    monkeypatch.setenv("JET_KERNELS", "auto, chunk_gla=reference")
    assert dispatch.backend("chunk_gla", CUDA) == "reference"
    assert dispatch.backend("recurrent_gla", CUDA) == "fla"


@pytest.mark.parametrize(
    ("setting", "operation", "device", "error", "message"),
    [
        ("fla", "chunk_gla", CPU, RuntimeError, "needs a GPU"),
        ("fla", "fused_dynamic_conv", CUDA, ValueError, "has no fla backend, only reference and triton"),
        ("cuda", "chunk_gla", CUDA, ValueError, "'cuda' is neither"),
        ("auto,chunk_gal=reference", "chunk_gla", CUDA, ValueError, "chunk_gal"),
    ],
)
def test_impossible_settings_are_errors(packages, monkeypatch, setting, operation, device, error, message):
    monkeypatch.setenv("JET_KERNELS", setting)
    with pytest.raises(error, match=message):
        dispatch.backend(operation, device)


def test_missing_packages_are_errors_with_a_fix(packages):
    packages.discard("fla")
    with pytest.raises(RuntimeError, match=r"package fla: pip install .* JET_KERNELS=reference"):
        dispatch.backend("chunk_gla", CUDA)
    assert dispatch.backend("chunk_gla", CPU) == "reference"


def test_training_is_checked_before_it_begins(packages, monkeypatch):
    from jet_kernels import fla_backend

    def refuse() -> None:
        raise RuntimeError("cannot train")

    monkeypatch.setattr(fla_backend, "check_triton_for_backward", refuse)
    dispatch.check_training("chunk_gated_delta_rule", CPU)
    dispatch.check_training("chunk_gla", CUDA)
    with pytest.raises(RuntimeError, match="cannot train"):
        dispatch.check_training("chunk_gated_delta_rule", CUDA)
    monkeypatch.setenv("JET_KERNELS", "auto,chunk_gated_delta_rule=reference")
    dispatch.check_training("chunk_gated_delta_rule", CUDA)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """An H100 with Triton 3.6.0 and the path of a ptxas 13.5."""
    import fla.utils

    ptxas = tmp_path / "ptxas"
    ptxas.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.5, V13.5.37'\n")
    ptxas.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(fla.utils, "IS_NVIDIA_HOPPER", True)
    monkeypatch.setattr(jet_kernels.hopper, "doubtful_triton", lambda: "3.6.0")
    monkeypatch.setattr(jet_kernels.hopper, "find_ptxas", lambda: ptxas)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    dispatch._prepare_hopper.cache_clear()
    yield ptxas
    dispatch._prepare_hopper.cache_clear()


@pytest.mark.parametrize("operation", ["chunk_gla", "fused_dynamic_conv"])
def test_the_first_kernel_on_hopper_chooses_and_reports_the_assembler(hopper, caplog, operation):
    with caplog.at_level(logging.INFO, logger="jet_kernels.dispatch"):
        assert dispatch.backend(operation, CPU) == "reference" and not os.environ["TRITON_PTXAS_PATH"]
        dispatch.backend(operation, CUDA)
        dispatch.backend("recurrent_gla", CUDA)
    assert os.environ["TRITON_PTXAS_PATH"] == str(hopper)
    said = [(r.levelname, r.getMessage()) for r in caplog.records if "ptxas" in r.getMessage()]
    assert said == [("INFO", f"triton 3.6.0 on Hopper: ptxas 13.5 at {hopper}")]


def test_without_a_current_assembler_the_log_warns_and_training_is_refused(hopper, caplog, monkeypatch):
    monkeypatch.setattr(jet_kernels.hopper, "find_ptxas", lambda: None)
    with caplog.at_level(logging.INFO, logger="jet_kernels.dispatch"):
        dispatch.backend("chunk_gated_delta_rule", CUDA)
    assert [r.levelname for r in caplog.records if "ptxas" in r.getMessage()] == ["WARNING"]
    assert not os.environ["TRITON_PTXAS_PATH"]
    with pytest.raises(RuntimeError, match="cannot train .* pip install 'nvidia-cuda-nvcc>=13.3'.* triton>=3.7.1"):
        dispatch.check_training("chunk_gated_delta_rule", CUDA)


def test_the_dispatcher_reports_the_tiles_it_trains_with(hopper, caplog, monkeypatch):
    from fla.backends import _operation_registries

    with caplog.at_level(logging.INFO, logger="jet_kernels.dispatch"):
        dispatch.check_training("chunk_gated_delta_rule", CUDA)
    assert "key tiles of 16, 32 or 128" in caplog.text
    backends = _operation_registries["common"]._backends
    assert backends["jet_hopper_tiles"].priority < backends["tilelang"].priority


def test_key_tiles_are_never_64():
    from jet_kernels.gated_delta_rule.hopper_backward import key_tile

    tiles = {width: key_tile(width) for width in range(1, 257)}
    assert set(tiles.values()) == {16, 32, 128}
    assert all(tile >= width or tile == 128 for width, tile in tiles.items())


def test_choice_is_logged_once(packages, caplog):
    with caplog.at_level(logging.INFO, logger="jet_kernels.dispatch"):
        for _ in range(3):
            dispatch.backend("chunk_gla", CUDA)
    assert [r.getMessage() for r in caplog.records] == ["chunk_gla on cuda: fla backend"]


def test_cpu_runs_the_references():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, k, v, gk = (normal(1, 9, 2, 4) for _ in range(4))
    g, beta, gk = -normal(1, 9, 2).abs(), normal(1, 9, 2).sigmoid(), -gk.abs()
    options = {"output_final_state": True, "cu_seqlens": torch.tensor([0, 2, 9])}
    x, weight = normal(1, 9, 6), normal(6, 3)
    pairs = [
        (dispatch.l2_normalize(q), gated_delta_rule.l2_normalize(q)),
        (dispatch.rms_norm_gated(q, v[0, 0, 0], k, 0.1), norm_gate.rms_norm_gated(q, v[0, 0, 0], k, 0.1)),
        (dispatch.causal_conv(x, weight, **options), short_conv.causal_conv(x, weight, **options)),
    ]
    for name in ("chunk_gated_delta_rule", "recurrent_gated_delta_rule"):
        args = (q, k, v, g, beta)
        pairs.append((getattr(dispatch, name)(*args, **options), getattr(gated_delta_rule, name)(*args, **options)))
    for name in ("chunk_gla", "recurrent_gla"):
        pairs.append((getattr(dispatch, name)(q, k, v, gk, **options), getattr(gla, name)(q, k, v, gk, **options)))
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_fused_conv_on_a_cpu_generates_kernels_by_channel_then_tap():
    torch.manual_seed(0)
    x, hidden, weight, bias = torch.randn(1, 7, 5), torch.randn(1, 7, 3), torch.randn(20, 3), torch.randn(20)
    options = {"cu_seqlens": torch.tensor([0, 2, 7]), "output_final_state": True}
    kernel = torch.stack([hidden @ weight[w::4].T + bias[w::4] for w in range(4)], -1)  # row d * W + w
    expected = dynamic_causal_conv(x, kernel, activation="silu", **options)
    torch.testing.assert_close(dispatch.fused_dynamic_conv(x, hidden, weight, bias, **options), expected)
    with pytest.raises(ValueError, match=r"must be \[B,T,D\]"):
        dispatch.fused_dynamic_conv(x, hidden, weight[:19], bias)


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.parent.name)
def test_references_stand_alone(path):
    # Exported checkpoints carry copies of these files, so they may import torch and the standard library only.
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            imported.add(node.module.split(".")[0])
    assert imported <= {"torch", *sys.stdlib_module_names}


def test_every_reference_is_checked():
    assert [path.parent.name for path in REFERENCES] == [
        "dynamic_conv",
        "gated_delta_rule",
        "gla",
        "norm_gate",
        "short_conv",
    ]


@pytest.mark.parametrize(
    "name", ["chunk_gated_delta_rule", "recurrent_gated_delta_rule", "chunk_gla", "recurrent_gla", "causal_conv"]
)
def test_fla_adapters_take_the_same_arguments(name):
    from jet_kernels import fla_backend

    reference = next(module for module in (gated_delta_rule, gla, short_conv) if hasattr(module, name))
    ours = dict(inspect.signature(getattr(reference, name)).parameters)
    ours.pop("chunk_size", None)  # a matter of speed that each backend settles for itself
    theirs = inspect.signature(getattr(fla_backend, name)).parameters
    assert list(ours) == [parameter for parameter in theirs if parameter != "chunk_size"]
