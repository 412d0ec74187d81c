"""Layer plan -> list of layer specs -> the model chunks of this rank.

GPTModel carries the layers. Megatron 0.19 calls it deprecated in favour of HybridModel, whose set of layer symbols is
closed to new mixers; this file is the only one that knows which of the two is used.
"""

import logging

from megatron.core import parallel_state
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_jet.configs.layer_plan import split_entry
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.mixers.backend import select_backend
from megatron_jet.mixers.registry import mixer_definition
from megatron_jet.model.initialize import initialize
from megatron_jet.model.layer import layer_spec
from megatron_jet.model.paths import Choices, check_choices, choice_layer_spec
from megatron_jet.model.rope import scaled_frequencies
from megatron_jet.model.transformer_config import transformer_config


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    dtype: str = "fp32",
    fp8: bool = False,
    choices: Choices | None = None,
    recompute: bool = False,
    init_seed: int | None = 0,
) -> list[GPTModel]:
    """Build this rank's part of a model. `init_parallel` must have run with the same layout.

    `chunk(tokens, position_ids, attention_mask=None, packed_seq_params=...)` gives logits [b, s, vocab/tp] on the last
    stage. No mask is needed: every mixer is causal. Packed sequences are one row with their cu_seqlens.

    Args:
        model: the model.
        parallel: the layout.
        dtype: "fp32" or "bf16". A_log of the gated delta rule stays in fp32.
        fp8: run linears in FP8 (Transformer Engine only).
        choices: for a supernet, the plan entries that each layer may take (model/paths.py); the layer plan's run first.
        recompute: recompute each layer's activations in the backward pass.
        init_seed: seed of the initial weights, which do not depend on the layout; None leaves the matrices zero, for
            callers that load every tensor.

    Returns:
        One chunk per virtual pipeline stage (one without virtual pipelining).

    Raises:
        UserError: the model does not fit the layout, or FP8 is asked for without Transformer Engine.
    """
    config = transformer_config(model, parallel, dtype=dtype, fp8=fp8)
    backend = select_backend(fp8)
    specs = layer_specs(model, backend, choices=choices, recompute=recompute)
    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline else [None]
    chunks = [_build_chunk(model, config, backend, specs, stage) for stage in stages]
    if init_seed is not None:
        initialize(chunks, model, init_seed, choices)
    return chunks


def layer_specs(
    model: ModelConfig, backend: BackendSpecProvider, *, choices: Choices | None = None, recompute: bool = False
) -> list[ModuleSpec]:
    """Specs of all layers of the model, in order. Raises UserError when the choices do not fit the model."""
    if choices is not None:
        check_choices(model, choices)
    specs = []
    for i, entry in enumerate(model.layer_plan):
        if choices is not None:
            mixer = choice_layer_spec(model, choices[i], entry, backend)
        else:
            mixer = mixer_definition(split_entry(entry)[0]).spec(model.mixer(i), model, backend)
        specs.append(layer_spec(mixer, backend, recompute))
    return specs


def _build_chunk(
    model: ModelConfig,
    config: TransformerConfig,
    backend: BackendSpecProvider,
    specs: list[ModuleSpec],
    vp_stage: int | None,
) -> GPTModel:
    """One chunk. TransformerBlock builds exactly the layers it is given, so the list is sliced here."""
    start = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    block = TransformerBlockSubmodules(
        layer_specs=specs[start : start + count], layer_norm=backend.layer_norm(rms_norm=True)
    )
    logging.getLogger(GPTModel.__module__).addFilter(_not_deprecation)
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        vp_stage=vp_stage,
    )
    if model.rope_scaling is not None:
        # Megatron's own option knows Llama 3.1's settings only; Llama 3.2 has another factor.
        chunk.rotary_pos_emb.inv_freq = scaled_frequencies(chunk.rotary_pos_emb.inv_freq, model.rope_scaling)
    return chunk


def _not_deprecation(record: logging.LogRecord) -> bool:
    """The docstring above says why GPTModel; its warning at every build would only worry users."""
    return "GPTModel IS DEPRECATED" not in record.getMessage()
