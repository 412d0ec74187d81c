"""Lets fla's kernels run in Triton's interpreter on a machine without a GPU. Import it before fla.

Four things stand in the way with Triton 3.6, numpy 2.5 and fla 0.6:
- the autotuner asks a GPU driver for timings: take the first configuration instead;
- a loop variable is a Python int in the interpreter, and kernels call `.to(...)` on it;
- fla binds `tl.gather` at import, before the interpreter replaces it;
- the interpreter keeps a scalar as an array of one element, which numpy no longer turns into a loop bound.
"""

import builtins
import os

import numpy as np
import triton.language as tl
from triton.runtime import autotuner, interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("set TRITON_INTERPRET=1 before Python starts")


class _LoopIndex(int):
    """An int that a kernel can convert to a Triton scalar."""

    def to(self, dtype, *_args, **_kwargs):
        value = np.array([int(self)], dtype=interpreter._get_np_dtype(dtype))
        return tl.tensor(interpreter.TensorHandle(value, dtype), dtype)


def _kernel_range(*bounds, **_kwargs):
    bounds = [int(b.handle.data.item()) if isinstance(b, tl.tensor) else int(b) for b in bounds]
    return map(_LoopIndex, builtins.range(*bounds))


def _first_config(self, *args, **kwargs):
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    config = self.prune_configs(kwargs)[0] if len(self.configs) > 1 else self.configs[0]
    self.best_config = config
    if config.pre_hook is not None:
        config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
    try:
        return self.fn.run(*args, **kwargs, **config.all_kwargs())
    finally:
        self.nargs = None


def _call_with_kernel_globals(self, *args, **kwargs):
    kernel_globals = self.fn.__globals__
    kernel_globals["range"] = _kernel_range
    if "gather" in kernel_globals:
        kernel_globals["gather"] = lambda *a, **k: tl.gather(*a, **k)
    return _launch(self, *args, **kwargs)


def _patch_tensor_with_index(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_patch_tensor = interpreter._patch_lang_tensor
interpreter._patch_lang_tensor = _patch_tensor_with_index
_launch = interpreter.GridExecutor.__call__
interpreter.GridExecutor.__call__ = _call_with_kernel_globals
autotuner.Autotuner.run = _first_config
