"""ModelConfig and layout -> Megatron's TransformerConfig."""

from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.mixers.backend import have_transformer_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    fp8: bool = False,
) -> TransformerConfig:
    """Megatron's view of a model.

    Args:
        model: the model; its layer plan is not in the result, the layer specs carry it.
        parallel: layout.
        dtype: type of parameters and activations.
        fp8: run linears in FP8 (needs Transformer Engine).

    Raises:
        UserError: unknown dtype, FP8 without Transformer Engine, or heads, MLP or layers that do not divide.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not supported; use one of {', '.join(DTYPES)}")
    transformer_engine = have_transformer_engine()
    if fp8 and not transformer_engine:
        raise UserError("fp8 needs Transformer Engine and a GPU; install the 'gpu' extra or use bf16")
    model.check_parallel(parallel.tensor, parallel.pipeline)
    stages = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if model.num_layers % stages:
        raise UserError(f"num_layers={model.num_layers} does not divide by pipeline*virtual_pipeline={stages}")
    gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=DTYPES[dtype],
        pipeline_dtype=DTYPES[dtype],
        bf16=dtype == "bf16",
        fp8="hybrid" if fp8 else None,
        transformer_impl="transformer_engine" if transformer_engine else "local",
        use_cpu_initialization=not gpu,
        init_method=torch.nn.init.zeros_,  # model/initialize.py fills the weights, the same for every layout
        output_layer_init_method=torch.nn.init.zeros_,
        embedding_init_method=torch.nn.init.zeros_,
        attention_softmax_in_fp32=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=gpu,
        bias_dropout_fusion=gpu,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=gpu,
        batch_p2p_comm=gpu,
    )
