"""Lets Megatron-Core 0.19 run on a CPU with gloo.

Megatron assumes a CUDA device in five places; each function below takes one of them away. Nothing here runs on a
machine with a GPU. Every patch was found by ablation (pipeline + DDP + distributed optimiser, one patch left out).

`install()` must run before anything imports Megatron, because Megatron's `jit_fuser` decorates functions at import.
"""

import contextlib
import functools
import logging
import warnings

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from megatron_jet.configs.environment import megatron_problem
from megatron_jet.configs.errors import UserError

_MARK = "_megatron_jet_cpu"


def install() -> None:
    """Check Megatron's version and make it usable on this machine. Idempotent; patches nothing when CUDA is available.

    Raises:
        UserError: megatron-core is missing or is not the version whose internals were checked.
    """
    problem = megatron_problem()
    if problem is not None:
        raise UserError(problem)
    if torch.cuda.is_available() or getattr(torch.cuda, _MARK, False):
        return
    setattr(torch.cuda, _MARK, True)
    # True, and of no use to somebody on a CPU.
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    warnings.filterwarnings("ignore", message=".*MimoModelConfig", category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a CUDA toolkit, but no GPU
    _patch_current_device()
    _patch_streams()
    _patch_device_literals()
    _patch_jit()
    _patch_rng()
    _patch_optimizers()


def _patch_current_device() -> None:
    """Megatron passes `torch.cuda.current_device()` as `device=` everywhere."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


class _NoStream:
    """Stands for a CUDA stream or event: on a CPU everything is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def query(self) -> bool:
        return True

    def record_event(self, event=None):
        return event or _NoStream()


def _patch_streams() -> None:
    """param_and_grad_buffer.py waits on the current stream; p2p and offload code make streams and events."""
    torch.cuda.Stream = torch.cuda.Event = _NoStream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _NoStream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def _is_cuda(device: object) -> bool:
    return str(device).startswith("cuda") if isinstance(device, (str, torch.device)) else False


def _patch_device_literals() -> None:
    """`device="cuda"`, `.cuda()` and `.to("cuda")` in the schedules, gradient clipping and the scalers.

    A TorchFunctionMode would also do, but it is not active in the backward pass, where recomputation needs it.
    """

    def on_cpu(factory):
        @functools.wraps(factory)
        def wrapped(*args, **kwargs):
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return wrapped

    # `with torch.device(...)` knows the factories from a list that it makes once. Made after this, the list would hold
    # the wrappers, and the block would do nothing: transformers would no longer load models on the meta device.
    _device_constructors()
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "eye", "empty_like", "zeros_like", "ones_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    to = torch.Tensor.to

    @functools.wraps(to)
    def to_cpu(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    torch.Tensor.to = to_cpu


def _patch_jit() -> None:
    """Megatron's jit_fuser is torch.compile, which on a CPU starts a C++ compiler at the first step."""
    from megatron.core import jit

    jit.disable_jit_fuser()


def _patch_rng() -> None:
    """Back Megatron's tracker of CUDA generator states by the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    class CpuRngStatesTracker(megatron_random.CudaRNGStatesTracker):
        """The same named states, kept of the CPU generator."""

        def add(self, name, seed):
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"rng state {name} or seed {seed} already exists")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name=megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME):
            if name not in self.states_:
                raise ValueError(f"rng state {name} is not added")
            outer_name, outer_state = self._current_state_name, torch.get_rng_state()
            if outer_name != "default-rng":
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                self._current_state_name = outer_name
                torch.set_rng_state(outer_state)

    # initialize_rng_tracker looks the class up by name when it is called.
    megatron_random.CudaRNGStatesTracker = CpuRngStatesTracker


class _CudaTypeNames(TorchFunctionMode):
    """Inside, `tensor.type()` says torch.cuda.FloatTensor, the only names Megatron's optimisers accept."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1) if "cuda" not in result else result
        return result


def _with_cuda_type_names(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with _CudaTypeNames():
            return function(*args, **kwargs)

    return wrapped


def _patch_optimizers() -> None:
    """The optimisers look at the type names of tensors."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    mixed = optimizer.Float16OptimizerWithFloat16Params
    mixed.__init__ = _with_cuda_type_names(mixed.__init__)
    optimizer.clip_grad_by_total_norm_fp32 = _with_cuda_type_names(optimizer.clip_grad_by_total_norm_fp32)

    distributed = distrib_optimizer.DistributedOptimizer
    distributed.__init__ = _with_cuda_type_names(distributed.__init__)
