"""One decoder layer: norm, mixer, norm, SwiGLU MLP; its spec; recomputation of its activations."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class DecoderLayer(TransformerLayer):
    """TransformerLayer that can recompute itself.

    Megatron recomputes inside the block, so hooks on its layers see tensors without a gradient. Here the layer does it,
    and what a hook collects (model/features.py) stays differentiable.
    """

    def __init__(self, *args, recompute: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.recompute = recompute

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        """hidden_states [s(/tp), b, h] -> the same shape, and Megatron's unused cross-attention context."""
        if not (self.recompute and self.training):
            return super().forward(hidden_states, **kwargs)
        # Without dropout there is no random state to restore. The non-reentrant form also serves inputs that need no
        # gradient themselves, as below a frozen embedding.
        run = partial(super().forward, **kwargs)
        return checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False)


def layer_spec(mixer: ModuleSpec, backend: BackendSpecProvider, recompute: bool = False) -> ModuleSpec:
    """Spec of a layer around a mixer's spec."""
    norm = backend.layer_norm(rms_norm=True)
    mlp = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()),
    )
    return ModuleSpec(
        module=DecoderLayer,
        params={"recompute": recompute},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
