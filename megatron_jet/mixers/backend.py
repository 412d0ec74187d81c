"""Which Megatron modules a model is built from: Transformer Engine on GPUs that have it, plain torch elsewhere.

Specs ask a `BackendSpecProvider` for linears, norms and core attention, so one spec serves both. Norms are always
separate modules (not fused into the next linear): parameter names, freezing patterns and checkpoints then do not
depend on the backend, and JetBlock's kernel generator can read the normed input.
"""

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from torch import Tensor, nn

from megatron_jet.configs.errors import UserError
from megatron_jet.mixers.sdpa import SdpaCoreAttention


class RMSNorm(nn.Module):
    """RMSNorm in fp32 whose weight may take part in sequence parallelism (Megatron's torch norm may not)."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # With sequence parallelism every rank sees other tokens; Megatron sums the marked gradients over TP.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class LocalBackend(LocalSpecProvider):
    """Megatron's own linears, our norm and our core attention. Runs on CPUs and on GPUs without TE."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False):
        return RMSNorm

    def core_attention(self) -> type:
        return SdpaCoreAttention


def have_transformer_engine() -> bool:
    """Whether TE modules can run here. Import success says nothing: Megatron puts mocks in place of missing ones."""
    return HAVE_TE and torch.cuda.is_available()


def select_backend(fp8: bool = False) -> BackendSpecProvider:
    """The provider for this machine.

    Raises:
        UserError: FP8 is asked for where Transformer Engine is missing; Megatron would silently ignore it.
    """
    if have_transformer_engine():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    if fp8:
        raise UserError("fp8 needs Transformer Engine and a GPU; install the 'gpu' extra or use bf16")
    return LocalBackend()
