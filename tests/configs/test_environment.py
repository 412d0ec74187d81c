"""What is said of an environment whose packages cannot run the project."""

import importlib.metadata
import importlib.util

import pytest

from megatron_jet.configs import environment
from megatron_jet.configs.mixers.gla import GLAConfig
from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.recipes.tiny import tiny


@pytest.fixture
def installed(monkeypatch):
    """Decides which versions seem installed."""
    versions = {"megatron-core": environment.SUPPORTED_MEGATRON, "triton": "3.6.0"}

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


def test_tilelang_is_a_way_out(installed):
    installed["tilelang"] = "0.1.15"
    assert environment.triton_problem("9.0", "auto") is None


def test_a_run_without_the_delta_rule_does_not_mind(installed, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(tiny()))
    assert "cannot train" in environment.run_problem(tmp_path, "9.0", "auto")
    assert environment.run_problem(tmp_path, None, "auto") is None
    plain = {stage: getattr(tiny(), stage).replace(candidates=("gla",)) for stage in ("block_selection", "new_block")}
    plain["placement"] = tiny().placement.replace(linear="gla")
    only_gla = tiny().replace(mixers={"gla": GLAConfig(num_heads=2, head_dim=8)}, **plain)
    (tmp_path / "config.yaml").write_text(dump_yaml(only_gla))
    assert environment.run_problem(tmp_path, "9.0", "auto") is None
