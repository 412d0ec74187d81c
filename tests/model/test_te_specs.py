"""Specs for Transformer Engine, without it: a recording backend whose modules take TE's arguments and nothing else.

The accepted arguments are read from the source of Megatron's TE wrappers, so that a new Megatron cannot drift away.
"""

import ast
import inspect
from collections import Counter
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from megatron_jet.configs.errors import UserError
from megatron_jet.mixers.backend import LocalBackend, RMSNorm, select_backend
from megatron_jet.mixers.sdpa import SdpaCoreAttention
from megatron_jet.model import builder
from mixers.mixer_cases import model_with, model_with_every_mixer

WRAPPERS = Path(megatron.core.__file__).parent / "extensions" / "transformer_engine.py"


def te_parameters(class_name: str, method: str = "__init__") -> list[inspect.Parameter]:
    """Parameters of a TE wrapper's constructor, self or cls left out."""
    for node in ast.walk(ast.parse(WRAPPERS.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            function = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == method)
            return _parameters(function.args)[1:]
    raise LookupError(class_name)


def _parameters(arguments: ast.arguments) -> list[inspect.Parameter]:
    """Parameters by name and kind; a default is only noted as being there."""
    first_default = len(arguments.args) - len(arguments.defaults)
    found = [
        inspect.Parameter(argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=_default(i >= first_default))
        for i, argument in enumerate(arguments.args)
    ]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        kind = inspect.Parameter.KEYWORD_ONLY
        found.append(inspect.Parameter(argument.arg, kind, default=_default(default is not None)))
    return found


def _default(exists: bool):
    return None if exists else inspect.Parameter.empty


class Recorder:
    """Checks constructor arguments against TE's and counts what is built."""

    def __init__(self):
        self.built: Counter[str] = Counter()
        self.windows: list[tuple[int, tuple[int, int] | None]] = []

    def check(self, class_name: str, args: tuple, kwargs: dict, method: str = "__init__") -> dict:
        bound = inspect.Signature(te_parameters(class_name, method)).bind(*args, **kwargs)
        self.built[class_name] += 1
        return bound.arguments


def recording_backend(recorder: Recorder) -> LocalBackend:
    """Local modules behind TE's constructors."""

    class Column(ColumnParallelLinear):
        def __init__(self, *args, **kwargs):
            given = recorder.check("TEColumnParallelLinear", args, kwargs)
            assert not given["gather_output"]  # TE cannot
            given.pop("name", None)
            super().__init__(given.pop("input_size"), given.pop("output_size"), **given)

    class Row(RowParallelLinear):
        def __init__(self, *args, **kwargs):
            given = recorder.check("TERowParallelLinear", args, kwargs)
            given.pop("name", None)
            super().__init__(given.pop("input_size"), given.pop("output_size"), **given)

    class Norm(nn.Module):
        def __new__(cls, *args, **kwargs):
            return RMSNorm(**recorder.check("TENorm", args, kwargs, "__new__"))

    class Core(SdpaCoreAttention):
        def __init__(self, *args, **kwargs):
            given = recorder.check("TEDotProductAttention", args, kwargs)
            recorder.windows.append((given["layer_number"], given["config"].window_size))
            assert given["config"].window_attn_skip_freq is None  # else TE would use its window in some layers only
            super().__init__(**given)

    class Backend(LocalBackend):
        def column_parallel_linear(self):
            return Column

        def row_parallel_linear(self):
            return Row

        def layer_norm(self, rms_norm=False, for_qk=False, has_residual=False):
            assert rms_norm
            return Norm

        def core_attention(self):
            return Core

    return Backend()


def test_every_module_comes_from_the_backend(single_rank, monkeypatch):
    """All linears, norms and core attentions are the backend's, with each layer's window, and the numbers are equal."""
    model = model_with_every_mixer().replace(qk_norm=True)
    tokens = torch.arange(20)[None]
    local = builder.build_model(model, single_rank)[0](tokens, None, None)
    recorder = Recorder()
    monkeypatch.setattr(builder, "select_backend", lambda fp8: recording_backend(recorder))
    chunk = builder.build_model(model, single_rank)[0]
    assert torch.equal(chunk(tokens, None, None), local)
    layers, softmax = model.num_layers, sum(model.mixer(i).is_softmax for i in range(model.num_layers))
    assert recorder.built == {
        "TEColumnParallelLinear": 2 * layers,  # the mixer's input projection and the MLP's
        "TERowParallelLinear": 2 * layers,
        "TENorm": 2 * layers + 1 + 2 * softmax,
        "TEDotProductAttention": softmax,
    }
    expected = []
    for i, entry in enumerate(model.layer_plan):
        if entry == "attn":
            expected.append((i + 1, None))
        elif entry.startswith("swa:"):
            expected.append((i + 1, (int(entry[4:]) - 1, 0)))
    assert recorder.windows == expected


def test_supernet_windows_are_core_attentions_of_their_own(single_rank, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(builder, "select_backend", lambda fp8: recording_backend(recorder))
    builder.build_model(model_with("attn"), single_rank, choices=(("attn", "swa:3", "swa:9"),))
    assert recorder.windows == [(1, None), (1, (2, 0)), (1, (8, 0))]


def test_fp8_without_transformer_engine_is_refused(single_rank):
    with pytest.raises(UserError, match="fp8 needs Transformer Engine"):
        builder.build_model(model_with("attn"), single_rank, fp8=True)
    with pytest.raises(UserError, match="fp8 needs Transformer Engine"):
        select_backend(fp8=True)
