"""Run a model layer by layer, so that a search can share the forward of common prefixes. Pipeline size 1 only."""

import torch
from torch import Tensor, nn

from megatron_jet.mixers.choice import ChoiceMixer
from megatron_jet.model.state import unwrap


def embed(model: nn.Module, tokens: Tensor) -> Tensor:
    """Token embeddings: tokens [b, s] -> hidden [s(/tp with sequence parallelism), b, h]."""
    return unwrap(model).embedding(input_ids=tokens, position_ids=None)


def run_layer(model: nn.Module, layer: int, hidden: Tensor, path: str | None = None) -> Tensor:
    """One decoder layer.

    Args:
        model: a model chunk that holds all layers.
        layer: 0-based index.
        hidden: [s(/tp), b, h]
        path: of a supernet's layer, the path to run (it stays selected); None runs the selected one.

    Returns:
        [s(/tp), b, h]
    """
    gpt = unwrap(model)
    module = gpt.decoder.layers[layer]
    if path is not None and isinstance(module.self_attention, ChoiceMixer):
        module.self_attention.select(path)
    length = hidden.shape[0] * (gpt.config.tensor_model_parallel_size if gpt.config.sequence_parallel else 1)
    output, _ = module(hidden_states=hidden, attention_mask=None, rotary_pos_emb=gpt.rotary_pos_emb(length))
    return output


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Final norm and vocabulary projection.

    Args:
        hidden: [s(/tp), b, h] after the last layer. Without sequence parallelism, any tokens stacked in this way.

    Returns:
        logits [b, s, vocab], gathered over tensor-parallel ranks.
    """
    gpt = unwrap(model)
    hidden = gpt.decoder.final_layernorm(hidden)
    weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
    logits, _ = gpt.output_layer(hidden, weight=weight, runtime_gather_output=True)
    return logits.transpose(0, 1).contiguous()


@torch.no_grad()
def run_all(model: nn.Module, tokens: Tensor) -> Tensor:
    """The whole model through the functions above: tokens [b, s] -> logits [b, s, vocab]."""
    hidden = embed(model, tokens)
    for layer in range(len(unwrap(model).decoder.layers)):
        hidden = run_layer(model, layer, hidden)
    return head(model, hidden)
