#!/usr/bin/env python3
"""Compiles every tuning candidate of the measured kernels for Hopper on all CPU cores, into Triton's cache.

    python prewarm.py [--workers N] [CASE ...]
    python prewarm.py --defaults DIR      instead: one configuration of every fla kernel, as its FLA_CONFIG_DIR wants it

fla tunes each kernel over up to 12 configurations per head size, and Triton compiles them one after the other: minutes
on the GPU's clock. A stand-in for the GPU driver turns launches into a list; the list is compiled in parallel, without
touching the GPU. A real launch then finds its machine code in the cache.
"""

import argparse
import importlib
import json
import os
import sys
import time
import types
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "kernels")]

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import autotuner, driver, jit  # noqa: E402

HOPPER = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    total_memory=80 << 30,
)
# rows, tokens, heads, key and value width; the first is Jet-Nemotron-2B's block, the second its Gated DeltaNet rival
SHAPES = {"jet": (2, 4096, 12, 96, 256), "gdn": (2, 4096, 4, 192, 384)}


class Driver:
    """What Triton asks a GPU driver for before it compiles."""

    class utils:  # noqa: N801
        @staticmethod
        def get_device_properties(_device):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    set_current_device = staticmethod(lambda device: None)
    get_current_stream = staticmethod(lambda device=0: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_device_interface = staticmethod(lambda: torch.cuda)
    map_python_to_cpp_type = staticmethod(lambda kind: "void*")


def record_launches() -> list:
    """From here on, launches are noted and not made. Returns the list: (name, call that compiles)."""
    driver.set_active(Driver())
    torch.cuda.get_device_name = lambda *_: HOPPER.name
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: HOPPER
    torch.cuda.device_count = lambda: 1
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    launches, launch, seen = [], jit.JITFunction.run, set()

    def note(function, *args, grid, warmup, **options):
        # Tensors count by type: two calls that differ in their contents only are one compilation.
        key = (function.fn.__name__, *map(_kind, args), *((k, _kind(v)) for k, v in sorted(options.items())))
        if key not in seen:
            seen.add(key)
            launches.append((function.fn.__name__, lambda: launch(function, *args, grid=grid, warmup=True, **options)))

    def every_config(tuner, *args, **options):
        tuner.nargs = dict(zip(tuner.arg_names, args))
        configs = tuner.prune_configs(options) if len(tuner.configs) > 1 else tuner.configs
        for config in configs:
            tuner.fn.run(*args, **{**options, **config.all_kwargs()})
        tuner.nargs = None

    jit.JITFunction.run = note
    autotuner.Autotuner.run = every_config
    return launches


def _kind(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16
    return str(value)


def delta_rule(shape, state: bool) -> None:
    """What the mixers call, forward and backward, and the decode step."""
    from jet_kernels import fla_backend

    b, t, h, dk, dv = shape

    def leaf(*size, dtype=torch.bfloat16):
        return torch.empty(size, dtype=dtype, requires_grad=not state)

    q, k = (fla_backend.l2_normalize(leaf(b, t, h, dk)) for _ in "qk")
    args = [q, k, leaf(b, t, h, dv), leaf(b, t, h, dtype=torch.float32), leaf(b, t, h, dtype=torch.float32)]
    first = torch.empty(b, h, dk, dv) if state else None
    o, _ = fla_backend.chunk_gated_delta_rule(*args, initial_state=first, output_final_state=state)
    y = fla_backend.rms_norm_gated(o, leaf(dv), leaf(b, t, h, dv))
    if not state:
        y.backward(torch.empty_like(y))


def convolutions(shape) -> None:
    """Static and dynamic convolutions of the mixers, forward and backward."""
    from jet_kernels import fla_backend
    from jet_kernels.dynamic_conv.fused import fused_dynamic_conv

    b, t, h, dk, dv = shape
    for width in {h * dk, h * dv}:
        x = torch.empty(b, t, width, dtype=torch.bfloat16, requires_grad=True)
        y, _ = fla_backend.causal_conv(
            x, torch.empty(width, 4, dtype=torch.bfloat16, requires_grad=True), activation="silu"
        )
        y.backward(torch.empty_like(y))
    x, hidden = (torch.empty(b, t, n, dtype=torch.bfloat16, requires_grad=True) for n in (h * dv, h * dv // 8))
    weight, bias = (torch.empty(h * dv * 4, *n, dtype=torch.bfloat16, requires_grad=True) for n in ((h * dv // 8,), ()))
    y, _ = fused_dynamic_conv(x, hidden, weight, bias)
    y.backward(torch.empty_like(y))


def write_defaults(folder: Path) -> None:
    """One file per tuned kernel of fla: small tiles and two warps, which need no warp-group instructions."""
    import gc

    from fla.ops.utils.cache import CachedAutotuner

    for module in (
        "fla.ops.gated_delta_rule",
        "fla.ops.gla",
        "fla.modules.causal_conv1d",
        "fla.modules.norm.fused_norm_gate",
        "fla.modules.norm.l2norm",
    ):
        importlib.import_module(module)
    folder.mkdir(parents=True, exist_ok=True)
    for tuner in (x for x in gc.get_objects() if isinstance(x, CachedAutotuner)):
        config = min(tuner.configs, key=lambda c: (abs(c.num_warps - 2), sorted(c.kwargs.items()), c.num_stages))
        chosen = {
            "kwargs": config.kwargs,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "num_ctas": 1,
        }
        text = json.dumps({"kernel_name": tuner.kernel_name, "default_config": chosen})
        (folder / f"{tuner.kernel_name}.json").write_text(text)
    print(f"{len(list(folder.iterdir()))} kernels in {folder.name}")


CASES = {
    "jet": lambda: delta_rule(SHAPES["jet"], state=False),
    "jet-prefill": lambda: delta_rule(SHAPES["jet"], state=True),
    "conv": lambda: convolutions(SHAPES["jet"]),
    "gdn": lambda: delta_rule(SHAPES["gdn"], state=False),
}


def compile_share(launches: list, worker: int, workers: int) -> None:
    """One process's part of the list; it never returns."""
    failed = 0
    for name, compile_it in launches[worker::workers]:
        try:
            compile_it()
        except Exception as error:  # a configuration that does not fit is skipped by the tuner, too
            failed += 1
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
    os._exit(min(failed, 100))


def main() -> None:
    """List, then compile in parallel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--defaults", type=Path, metavar="DIR")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {' '.join(CASES)}")
    options = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)
    launches = record_launches()
    if options.defaults:
        write_defaults(options.defaults)
        return
    for name in options.cases or CASES:
        CASES[name]()
    listed = time.time() - started
    children = []
    for worker in range(options.workers):
        pid = os.fork()
        if pid == 0:
            compile_share(launches, worker, options.workers)
        children.append(pid)
    failed = sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in children)
    seconds = round(time.time() - started, 1)
    print(
        json.dumps(
            {
                "kernels": len(launches),
                "workers": options.workers,
                "seconds": seconds,
                "listing": round(listed, 1),
                "workers_with_failures": failed,
            }
        )
    )


if __name__ == "__main__":
    main()
