"""The operations of jet_kernels as benchmark cases: random inputs of a shape, and the call."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_kernels import dispatch
from megatron_jet.configs.errors import UserError

CONV_SIZE = 4
GENERATOR_REDUCTION = 8
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Batch rows, tokens, heads, and the width of a key and a value head."""

    batch: int
    time: int
    heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """`8x4096x12x96x256`: B x T x H x Dk x Dv. Raises UserError for anything else."""
        parts = text.split("x")
        if len(parts) != 5 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise UserError(f"shape '{text}': write BxTxHxDKxDV with five numbers above 0, such as 8x4096x12x96x256")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.batch}x{self.time}x{self.heads}x{self.key_dim}x{self.value_dim}"

    @property
    def channels(self) -> int:
        """Value channels of all heads."""
        return self.heads * self.value_dim


class Draw:
    """Random inputs on a device. Sums, decays and states are in fp32, as the mixers pass them."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self.device, dtype=dtype or self.dtype)

    def keys(self, normalize: bool = True) -> Tensor:
        """[B, T, H, Dk]."""
        s = self.shape
        x = self.normal(s.batch, s.time, s.heads, s.key_dim)
        return F.normalize(x, dim=-1) if normalize else x

    def values(self) -> Tensor:
        """[B, T, H, Dv]."""
        s = self.shape
        return self.normal(s.batch, s.time, s.heads, s.value_dim)

    def per_head(self) -> Tensor:
        """[B, T, H], in fp32."""
        return self.normal(self.shape.batch, self.shape.time, self.shape.heads, dtype=torch.float32)

    def state(self) -> Tensor:
        """[B, H, Dk, Dv], in fp32."""
        s = self.shape
        return self.normal(s.batch, s.heads, s.key_dim, s.value_dim, dtype=torch.float32)

    def channels(self, width: int) -> Tensor:
        """[B, T, width]."""
        return self.normal(self.shape.batch, self.shape.time, width)


@dataclass(frozen=True)
class Case:
    """One operation.

    Attributes:
        operation: its name in jet_kernels.dispatch.
        draw: inputs of a shape.
        options: further arguments.
        decodes: for one token only, with a state; has no backward.
    """

    operation: str
    draw: Callable[[Draw], Inputs]
    options: tuple[tuple[str, object], ...] = ()
    decodes: bool = False

    def call(self, inputs: Inputs) -> list[Tensor]:
        """Outputs, on the backend that JET_KERNELS names."""
        out = getattr(dispatch, self.operation)(**inputs, **dict(self.options))
        return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]

    @property
    def backends(self) -> tuple[str, str]:
        """Plain torch, and the fast one."""
        return "reference", dispatch.fast_backend(self.operation)


def _delta_rule(d: Draw) -> Inputs:
    return {
        "q": d.keys(),
        "k": d.keys(),
        "v": d.values(),
        "g": -d.per_head().abs() / 8,
        "beta": d.per_head().sigmoid().to(d.dtype),
    }


def _gla(d: Draw) -> Inputs:
    decay = F.logsigmoid(d.keys(normalize=False).float()) / 16
    return {"q": d.keys(), "k": d.keys(), "v": d.values(), "gk": decay}


def _with_state(draw: Callable[[Draw], Inputs]) -> Callable[[Draw], Inputs]:
    return lambda d: draw(d) | {"initial_state": d.state()}


def _short_conv(d: Draw) -> Inputs:
    return {"x": d.channels(d.shape.channels), "weight": d.normal(d.shape.channels, CONV_SIZE)}


def _dynamic_conv(d: Draw) -> Inputs:
    channels = d.shape.channels
    rank = max(1, channels // GENERATOR_REDUCTION)
    return {
        "x": d.channels(channels),
        "hidden": d.channels(rank),
        "weight": d.normal(channels * CONV_SIZE, rank) / rank,
        "bias": d.normal(channels * CONV_SIZE),
    }


def _norm_gate(d: Draw) -> Inputs:
    return {"x": d.values(), "weight": d.normal(d.shape.value_dim), "gate": d.values()}


_DECODE = (("output_final_state", True),)
CASES = {
    case.operation: case
    for case in (
        Case("chunk_gated_delta_rule", _delta_rule),
        Case("recurrent_gated_delta_rule", _with_state(_delta_rule), _DECODE, decodes=True),
        Case("chunk_gla", _gla),
        Case("recurrent_gla", _with_state(_gla), _DECODE, decodes=True),
        Case("fused_dynamic_conv", _dynamic_conv),
        Case("causal_conv", _short_conv, (("activation", "silu"),)),
        Case("rms_norm_gated", _norm_gate),
        Case("l2_normalize", lambda d: {"x": d.keys(normalize=False)}),
    )
}


@contextmanager
def use_backend(operation: str, name: str) -> Iterator[None]:
    """Run one operation on one backend."""
    before = os.environ.get("JET_KERNELS")
    os.environ["JET_KERNELS"] = f"auto,{operation}={name}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["JET_KERNELS"]
        else:
            os.environ["JET_KERNELS"] = before
