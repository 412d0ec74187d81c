"""Compares the GPU kernels with the references and prints one JSON object. Not a test file: tests run it.

    python kernel_cases.py --device cpu  [CASE ...]   # Triton's interpreter; needs TRITON_INTERPRET=1, fp32 only
    python kernel_cases.py --device cuda --dtype bfloat16

Each case gives error ratios RMS(kernel - reference) / RMS(reference) of outputs, states and gradients.
The reference runs in fp64 on the same inputs.
"""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import one_config  # noqa: E402


class Bench:
    """Device and dtype of the kernels, and the inputs of a case."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A normal tensor on the CPU, rounded to the kernels' dtype, kept in fp64."""
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype).double()

    def compare(self, kernel, reference, inputs: dict[str, torch.Tensor], grads: bool = True, fp32=("g", "gk")) -> dict:
        """Error ratios of outputs (o0, o1, ...) and gradients (d<input>) for the same random output gradients."""
        results = []
        for function, device, dtype in ((reference, "cpu", None), (kernel, self.device, self.dtype)):
            keep = dict.fromkeys((*fp32, "initial_state", "A"), torch.float32)
            args = {
                name: x.to(device, x.dtype if dtype is None else keep.get(name, dtype)).requires_grad_(grads)
                for name, x in inputs.items()
            }
            outputs = [o for o in function(**args) if o is not None]
            weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(n)) for n, o in enumerate(outputs)]
            found = {f"o{n}": o.detach() for n, o in enumerate(outputs)}
            if grads:
                loss = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True))
                found |= {f"d{k}": d for k, d in zip(args, torch.autograd.grad(loss, list(args.values())), strict=True)}
            results.append(found)
        expected, actual = results
        return {name: error_ratio(actual[name], expected[name]) for name in expected}


def error_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(actual - expected) / RMS(expected); NaN anywhere gives NaN."""
    difference = actual.double().cpu() - expected.double().cpu()
    return (difference.square().mean().sqrt() / expected.double().square().mean().sqrt().clamp(min=1e-30)).item()


def conv_case(bench, *, batch, time_, dim, rank, width, bounds=None, state=False, activation="silu", limit=None):
    """Fused dynamic convolution against generator and convolution in plain torch."""
    from jet_kernels.dynamic_conv import fused
    from jet_kernels.dynamic_conv.reference import dynamic_causal_conv

    inputs = {
        "x": bench.draw(batch, time_, dim),
        "hidden": bench.draw(batch, time_, rank),
        "weight": bench.draw(dim * width, rank) / 8,
        "bias": bench.draw(dim * width),
    }
    sequences = batch if bounds is None else len(bounds) - 1
    if state:
        inputs["initial_state"] = bench.draw(sequences, width - 1, dim)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)

    def reference(x, hidden, weight, bias, initial_state=None):
        kernel = F.linear(hidden, weight, bias).unflatten(-1, (dim, width))
        return dynamic_causal_conv(
            x,
            kernel,
            initial_state=initial_state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            activation=activation,
        )

    def kernel(x, hidden, weight, bias, initial_state=None):
        return fused.fused_dynamic_conv(
            x,
            hidden,
            weight,
            bias,
            initial_state=initial_state,
            output_final_state=True,
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(bench.device),
            activation=activation,
        )

    usual = fused._MAX_DKERNEL
    fused._MAX_DKERNEL = usual if limit is None else limit
    try:
        return bench.compare(kernel, reference, inputs)
    finally:
        fused._MAX_DKERNEL = usual


def conv_saved_bytes(bench):
    """Bytes kept for the backward, over the bytes of x, hidden, parameters and token positions."""
    from jet_kernels.dynamic_conv.fused import fused_dynamic_conv

    tokens, dim, rank, width = 64, 32, 16, 4
    sizes = ((1, tokens, dim), (1, tokens, rank), (dim * width, rank), (dim * width,))
    args = [bench.draw(*size).to(bench.device, bench.dtype).requires_grad_() for size in sizes]
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fused_dynamic_conv(*args)
    allowed = sum(x.numel() * x.element_size() for x in args) + 2 * 4 * tokens + 2 * 8
    return {"saved": sum(saved.values()) / allowed}


def hopper_case(bench, **options):
    """The gated delta rule with our launch of fla's backward kernel, as a Hopper GPU with Triton 3.6 takes it."""
    from jet_kernels.gated_delta_rule import hopper_backward

    tiles = []

    class Forced(hopper_backward.HopperTiles):
        is_available = classmethod(lambda cls: True)

        def chunk_bwd_dqkwg(self, *args, **kwargs):
            tiles.append(hopper_backward.key_tile(options["key_dim"]))
            return super().chunk_bwd_dqkwg(*args, **kwargs)

    hopper_backward.register("common")(Forced)
    try:
        errors = delta_rule_case(bench, chunked=True, **options)
    finally:
        hopper_backward.register("common")(hopper_backward.HopperTiles)
    if len(tiles) != 1 or 64 in tiles:
        raise AssertionError(f"launched with key tiles {tiles}")
    return errors


def delta_rule_case(bench, *, chunked, time_, bounds=None, key_dim=16, value_dim=32, decay=1.0):
    """fla's gated delta rule behind our dispatcher, with initial and final states."""
    from jet_kernels import dispatch
    from jet_kernels.gated_delta_rule import reference

    shape = (1, time_, 2) if bounds else (2, time_, 1)
    inputs = {
        "q": F.normalize(bench.draw(*shape, key_dim), dim=-1),
        "k": F.normalize(bench.draw(*shape, key_dim), dim=-1),
        "v": bench.draw(*shape, value_dim),
        "g": -bench.draw(*shape, dtype=torch.float32).abs() * decay,
        "beta": bench.draw(*shape).sigmoid(),
        "initial_state": bench.draw(*_state_shape(shape, bounds), key_dim, value_dim, dtype=torch.float32),
    }
    # Round once more, so that kernel and reference see the same numbers.
    inputs |= {name: inputs[name].to(bench.dtype).double() for name in ("q", "k", "beta")}
    name = "chunk_gated_delta_rule" if chunked else "recurrent_gated_delta_rule"
    options = {"output_final_state": True}
    kernel = _with_bounds(getattr(dispatch, name), bounds, bench.device, options)
    return bench.compare(kernel, _with_bounds(getattr(reference, name), bounds, "cpu", options), inputs, grads=chunked)


def gla_case(bench, *, chunked, time_, bounds=None, dim=16):
    """fla's GLA behind our dispatcher, with initial and final states."""
    from jet_kernels import dispatch
    from jet_kernels.gla import reference

    shape = (1, time_, 2, dim) if bounds else (2, time_, 1, dim)
    inputs = {name: bench.draw(*shape) for name in "qkv"}
    inputs["gk"] = F.logsigmoid(bench.draw(*shape, dtype=torch.float32)) / 4
    inputs["initial_state"] = bench.draw(*_state_shape(shape, bounds), dim, dim, dtype=torch.float32)
    inputs["gk"] = inputs["gk"].float().double()
    name = "chunk_gla" if chunked else "recurrent_gla"
    options = {"output_final_state": True}
    kernel = _with_bounds(getattr(dispatch, name), bounds, bench.device, options)
    return bench.compare(kernel, _with_bounds(getattr(reference, name), bounds, "cpu", options), inputs)


def short_conv_case(bench, *, time_, bounds=None, state=True):
    """fla's causal convolution behind our dispatcher; our state has W - 1 inputs, fla's has W."""
    from jet_kernels import dispatch
    from jet_kernels.short_conv import reference

    dim, width = 24, 4
    inputs = {"x": bench.draw(1 if bounds else 2, time_, dim), "weight": bench.draw(dim, width)}
    inputs["bias"] = bench.draw(dim)
    if state:
        inputs["initial_state"] = bench.draw(len(bounds) - 1 if bounds else 2, width - 1, dim)
    options = {"activation": "silu", "output_final_state": state}
    kernel = _with_bounds(dispatch.causal_conv, bounds, bench.device, options)
    return bench.compare(kernel, _with_bounds(reference.causal_conv, bounds, "cpu", options), inputs)


def norm_case(bench):
    """fla's gated RMSNorm and l2 normalisation behind our dispatcher."""
    from jet_kernels import dispatch
    from jet_kernels.gated_delta_rule.reference import l2_normalize
    from jet_kernels.norm_gate.reference import rms_norm_gated

    inputs = {"x": bench.draw(2, 5, 3, 24), "weight": bench.draw(24), "gate": bench.draw(2, 5, 3, 24)}

    def both(norm_gate, normalize):
        return lambda x, weight, gate: (norm_gate(x, weight, gate, 1e-3), normalize(x, 1e-3))

    kernel = both(dispatch.rms_norm_gated, dispatch.l2_normalize)
    return bench.compare(kernel, both(rms_norm_gated, l2_normalize), inputs)


def naive_case(bench):
    """Our references against fla's own plain-torch ones, which others wrote (fp64, on the CPU)."""
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla

    from jet_kernels.gated_delta_rule.reference import chunk_gated_delta_rule
    from jet_kernels.gla.reference import chunk_gla

    q, k, v = (bench.draw(2, 70, 3, 8) / 3 for _ in "qkv")
    g, beta, gk = -bench.draw(2, 70, 3).abs(), bench.draw(2, 70, 3).sigmoid(), -bench.draw(2, 70, 3, 8).abs()
    state = bench.draw(2, 3, 8, 8)
    ours = [
        *chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True),
        *chunk_gla(q, k, v, gk, initial_state=state, output_final_state=True),
    ]
    theirs = [
        *naive_recurrent_gated_delta_rule(q, k, v, beta, g, initial_state=state, output_final_state=True),
        *naive_recurrent_gla(q, k, v, gk, initial_state=state, output_final_state=True),
    ]
    return {f"o{n}": error_ratio(a, b) for n, (a, b) in enumerate(zip(ours, theirs, strict=True))}


def _state_shape(shape, bounds):
    return (len(bounds) - 1 if bounds else shape[0], shape[2])


def _with_bounds(function, bounds, device, options):
    if bounds is not None:
        options = options | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=device)}
    return lambda **args: function(**args, **options)


_PACKED = [0, 1, 3, 30, 70]
CASES = {
    "conv_dense": lambda b: conv_case(b, batch=2, time_=70, dim=72, rank=40, width=4),
    "conv_packed": lambda b: conv_case(b, batch=1, time_=70, dim=40, rank=24, width=4, bounds=[0, 1, 3, 3, 40, 70]),
    "conv_packed_state": lambda b: conv_case(
        b, batch=1, time_=70, dim=40, rank=24, width=4, bounds=[0, 1, 3, 3, 40, 70], state=True
    ),
    "conv_width_2": lambda b: conv_case(b, batch=1, time_=9, dim=24, rank=20, width=2, bounds=[0, 1, 9]),
    "conv_width_3": lambda b: conv_case(b, batch=2, time_=9, dim=24, rank=20, width=3, state=True, activation=None),
    "conv_decode": lambda b: conv_case(b, batch=3, time_=1, dim=40, rank=24, width=4, state=True),
    "conv_limited": lambda b: conv_case(b, batch=1, time_=70, dim=40, rank=24, width=4, limit=33 * 160),
    "conv_saved_bytes": conv_saved_bytes,
    "delta_rule_chunk": lambda b: delta_rule_case(b, chunked=True, time_=70),
    "delta_rule_chunk_packed": lambda b: delta_rule_case(b, chunked=True, time_=70, bounds=_PACKED),
    "delta_rule_recurrent": lambda b: delta_rule_case(b, chunked=False, time_=5),
    # Our launch for Hopper: every width of key tile, one of them partly filled, then the published heads.
    "hopper_16": lambda b: hopper_case(b, time_=70, key_dim=12),
    "hopper_32": lambda b: hopper_case(b, time_=70, key_dim=32, bounds=_PACKED),
    "hopper_64": lambda b: hopper_case(b, time_=70, key_dim=64),
    "hopper_96x256": lambda b: hopper_case(b, time_=66, key_dim=96, value_dim=256, decay=0.1),
    "hopper_128x256": lambda b: hopper_case(b, time_=200, key_dim=128, value_dim=256, decay=0.1),
    "delta_rule_96x256": lambda b: delta_rule_case(b, chunked=True, time_=200, key_dim=96, value_dim=256, decay=0.1),
    "delta_rule_128x256": lambda b: delta_rule_case(
        b, chunked=True, time_=200, key_dim=128, value_dim=256, decay=0.1, bounds=[0, 1, 66, 200]
    ),
    "gla_chunk": lambda b: gla_case(b, chunked=True, time_=70),
    "gla_chunk_packed": lambda b: gla_case(b, chunked=True, time_=70, bounds=_PACKED),
    "gla_recurrent": lambda b: gla_case(b, chunked=False, time_=5),
    "short_conv": lambda b: short_conv_case(b, time_=9),
    "short_conv_short": lambda b: short_conv_case(b, time_=2),
    "short_conv_packed": lambda b: short_conv_case(b, time_=70, bounds=_PACKED, state=False),
    "norms": norm_case,
    "naive": naive_case,
}
# The published heads, too large for the interpreter.
GPU_ONLY = ("hopper_128x256", "delta_rule_96x256", "delta_rule_128x256")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    options = parser.parse_args()
    if options.device == "cpu":
        if options.dtype != "float32":
            parser.error("Triton's interpreter computes wrong bf16 numbers")
        import interpreter_shim  # noqa: F401
    else:
        one_config.install()
    torch.set_num_threads(1)
    # Fills torch.empty with NaN, so that a kernel that reads what nobody wrote shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ["JET_KERNELS"] = "fla,fused_dynamic_conv=triton"
    report = {}
    fitting = [name for name in CASES if options.device == "cuda" or name not in GPU_ONLY]
    for name in options.cases or fitting:
        start = time.time()
        try:
            report[name] = {"errors": CASES[name](Bench(options.device, getattr(torch, options.dtype)))}
        except Exception:
            report[name] = {"failed": traceback.format_exc()}
        report[name]["seconds"] = time.time() - start
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
