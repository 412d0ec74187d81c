"""Compiles kernels for sm_90 (H100) on a machine without a GPU and prints one JSON object. Tests run it.

    python compile_kernels.py conv | fla | hopper

A stand-in for the GPU driver answers Triton's questions, every launch becomes a compilation, and nothing
runs. It patches torch.cuda for the whole process, so it needs a process of its own.

For each kernel: name, case, registers per thread, spill stores and loads, shared memory in bytes, the number of Hopper
matrix instructions (HGMMA), and the width of its key tile if it has one (BK).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import types

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402
import triton.backends.nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402

import one_config  # noqa: E402

_TOOLS = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin")
_H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    total_memory=80 << 30,
)


class _Driver:
    """What Triton asks a GPU driver for before it compiles."""

    class utils:  # noqa: N801
        @staticmethod
        def get_device_properties(_device):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, _type):
        return "void*"


class Compiler:
    """Collects every kernel that is launched."""

    def __init__(self):
        self.case = ""
        self.found = {}
        driver.set_active(_Driver())
        torch.cuda.get_device_name = lambda *_: _H100.name
        torch.cuda.get_device_capability = lambda *_: (_H100.major, _H100.minor)
        torch.cuda.get_device_properties = lambda *_: _H100
        torch.cuda.device_count = lambda: 1
        torch.cuda.is_available = lambda: True
        torch.cuda.current_device = lambda: 0
        launch = jit.JITFunction.run

        def compile_only(function, *args, grid, warmup, **options):
            kernel = launch(function, *args, grid=grid, warmup=True, **options)
            self.found.setdefault(kernel.hash, (function.fn.__name__, self.case, kernel))
            return kernel

        jit.JITFunction.run = compile_only
        one_config.install()

    def report(self) -> dict:
        kernels = [
            {
                "kernel": name,
                "case": case,
                **_resources(kernel.asm["cubin"]),
                "shared": kernel.metadata.shared,
                "key_tile": _constant(kernel, "BK"),
            }
            for name, case, kernel in self.found.values()
        ]
        return {"kernels": kernels}


def _constant(kernel, name: str) -> int | None:
    """Value of a compile-time argument."""
    place = (kernel.src.fn.arg_names.index(name),) if name in kernel.src.fn.arg_names else None
    return kernel.src.constants.get(place)


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
        code = _run_tool("nvdisasm", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)", code)),
        "hgmma": code.count("HGMMA"),
    }


def _run_tool(*command: str) -> str:
    tool = os.path.join(_TOOLS, command[0])
    return subprocess.run([tool, *command[1:]], capture_output=True, text=True, check=True).stdout


def compile_conv(compiler: Compiler) -> None:
    """The fused dynamic convolution at the sizes of Jet-Nemotron 2B and 4B."""
    from jet_kernels.dynamic_conv import fused

    cases = [
        ("2B", 3072, 384, 4096, torch.bfloat16, False),
        ("2B state", 3072, 384, 4096, torch.bfloat16, True),
        ("2B decode", 3072, 384, 32, torch.bfloat16, True),
        ("4B", 4096, 512, 4096, torch.bfloat16, False),
    ]
    for compiler.case, dim, rank, tokens, dtype, has_state in cases:

        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype)

        x, hidden, weight, bias = empty(tokens, dim), empty(tokens, rank), empty(dim * 4, rank), empty(dim * 4)
        state = empty(1, 3, dim) if has_state else None
        pos = empty(tokens, dtype=torch.int32)
        fused.run_forward(x, hidden, weight, bias, state, pos, pos, True, None)
        if tokens > 64:
            fused.run_forward(x, hidden, weight, bias, state, pos, pos, True, x)
            fused.write_kernel_gradient(x, state, pos, pos, x, empty(tokens, dim * 4), 0, tokens)
        if tokens > 64 and not has_state:
            fused.input_gradient(x, hidden, weight, bias, pos)


def compile_fla(compiler: Compiler) -> None:
    """fla's gated delta rule behind our dispatcher at the head sizes of both models, as a Hopper GPU runs it."""
    from jet_kernels import fla_backend, hopper

    hopper.ptxas_problem = lambda: None  # whichever assembler is here: nothing runs
    for compiler.case, key_dim, value_dim in (("2B", 96, 256), ("4B", 128, 256)):
        sizes = ((key_dim,), (key_dim,), (value_dim,), (), ())
        inputs = [torch.randn(1, 256, 1, *size, dtype=torch.bfloat16, requires_grad=True) for size in sizes]
        inputs[3] = inputs[3].float()  # g
        o, _ = fla_backend.chunk_gated_delta_rule(*inputs)
        o.sum().backward()


def compile_hopper(compiler: Compiler) -> None:
    """Our launch of fla's backward kernel, as fla calls it."""
    from fla.ops.common.chunk_o import chunk_bwd_dqkwg

    from jet_kernels import hopper

    hopper.ptxas_problem = lambda: None
    from jet_kernels.gated_delta_rule import hopper_backward  # noqa: F401  registers itself

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype)

    for width in (32, 64):
        compiler.case = str(width)
        q, k, w = (empty(1, 128, 1, width) for _ in "qkw")
        v, do, dv = (empty(1, 128, 1, 256) for _ in range(3))
        h, dh = (empty(1, 2, 1, width, 256) for _ in range(2))
        decay = empty(1, 128, 1, dtype=torch.float32)
        chunk_bwd_dqkwg(q=q, k=k, v=v, do=do, h=h, dh=dh, w=w, g=decay, dv=dv, scale=0.1)


if __name__ == "__main__":
    found = Compiler()
    {"conv": compile_conv, "fla": compile_fla, "hopper": compile_hopper}[sys.argv[1]](found)
    json.dump(found.report(), sys.stdout)
