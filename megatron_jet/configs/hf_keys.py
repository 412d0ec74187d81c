"""Which keys of a config.json are understood, which may be passed over, and why the others are refused. No torch.

Every key is in one of three lists: read here, without effect on what a model computes, or without effect at one value
only. A key in none of them may change the model, so that weights would be taken for those of another one: it is refused
unless it is null, false or empty, which switches a feature off.
"""

import re
from typing import Any

from megatron_jet.configs.errors import UserError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Read by hf_format.py, in every file.
READ = _names(
    "model_type architectures auto_map hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim vocab_size max_position_embeddings rope_theta rope_scaling rope_parameters "
    "rms_norm_eps initializer_range tie_word_embeddings bos_token_id eos_token_id pad_token_id hidden_act "
    "layer_types"
)
READ_OF_HYBRIDS = _names("efficient_attention_config windows base_model_type qkv_bias qk_norm")
READ_OF_WINDOWS = _names("use_sliding_window sliding_window max_window_layers")

# Without effect on what a model computes: origin, types, speed, training, generation, leftovers of other tasks.
HARMLESS = _names(
    # origin and types; schema_version is this project's own mark on its JSON files
    "schema_version transformers_version torch_dtype dtype _name_or_path _commit_hash name_or_path license "
    "is_llama_config transformers.js_config transformers_weights tokenizer_class model_max_length max_sequence_length "
    # how it is run
    "use_cache cache_implementation attn_implementation _attn_implementation _attn_implementation_internal "
    "_attn_implementation_autoset _experts_implementation _flash_attn_2_enabled use_flash_attn use_flash_attention "
    "use_flash_attention_2 pretraining_tp chunk_size_feed_forward torchscript use_bfloat16 return_dict "
    "output_attentions output_hidden_states is_decoder tie_encoder_decoder tf_legacy_loss "
    # training
    "attention_dropout hidden_dropout attn_pdrop resid_pdrop embd_pdrop residual_dropout embedding_dropout "
    "classifier_dropout gradient_checkpointing rescale_prenorm_residual "
    # generation
    "max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens decoder_start_token_id sep_token_id unk_token_id cls_token_id mask_token_id prefix "
    # other tasks
    "id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params "
    "keys_to_ignore_at_inference"
)
HARMLESS_PREFIXES = ("unsloth_",)

# Features that are off (or as here) at these values; true and false are not 1 and 0 here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),  # true would put a bias on the output projection too
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "is_causal": (True,),
    "causal": (True,),
    "use_rope": (True,),
    "hidden_activation": ("silu",),
    "activation": ("swiglu", "silu"),  # some Llamas name their MLP so; hidden_act is what is read
    "position_embedding_type": ("rope", "absolute"),  # the second was written into every file; nothing read it
}
UNIT = re.compile(r"(_multiplier|_scale|_scaling|_scalar|_factor|_coef)$")  # 1 leaves the model as it is

QUANTISED = ("quantization_config", "compression_config", "quantization")
NULL_MEANS_NOTHING = (
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
    "max_position_embeddings",
    "tie_word_embeddings",
    "use_sliding_window",
    "max_window_layers",
)


def check_keys(config: dict[str, Any], hybrid: bool, architecture: str, where: str) -> None:
    """Raise UserError for the first key that changes a model and is not understood.

    Args:
        config: content of a config.json whose types were checked.
        hybrid: it is one of the hybrid formats.
        architecture: class name that belongs to its model type.
        where: names the file in messages.
    """
    _refuse_quantised(config, where)
    _refuse_other_heads(config, architecture, where)
    if not hybrid:
        _refuse_foreign_code(config, where)
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act '{config['hidden_act']}' is not supported, only silu")
    for key in NULL_MEANS_NOTHING:
        if key in config and config[key] is None:
            raise UserError(f"{where}: {key} is null; give its value, or remove the key where the default is meant")
    if hybrid and config.get("use_sliding_window"):
        raise UserError(f"{where}: use_sliding_window is for plain models; a hybrid's windows are its 'swa' layers")
    known = READ | READ_OF_WINDOWS | (READ_OF_HYBRIDS if hybrid else frozenset())
    for key, value in config.items():
        if key not in known and not _without_effect(key, value):
            raise UserError(
                f"{where}: {key}={_shown(value)} is not understood for model_type '{config['model_type']}'; it may "
                "change what the model computes. Remove the key if it does not"
            )


def _without_effect(key: str, value: Any) -> bool:
    if key in HARMLESS or key.startswith(HARMLESS_PREFIXES):
        return True
    if key in NEUTRAL:
        return value is None or any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[key])
    if value is None or value is False or value in ("", [], {}):
        return True
    return bool(UNIT.search(key)) and not isinstance(value, bool) and value == 1


def _refuse_quantised(config: dict[str, Any], where: str) -> None:
    for key in QUANTISED:
        settings = config.get(key)
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            kind = f" ({method})" if isinstance(method, str) else ""
            raise UserError(
                f"{where}: {key} says that the weights are quantised{kind}; dequantise them to bf16 first, and remove "
                "the key when that is done"
            )


def _refuse_other_heads(config: dict[str, Any], architecture: str, where: str) -> None:
    names = config.get("architectures")
    if not names:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: architectures={_shown(names)} is not a list of class names")
    if architecture.lower() not in (name.lower() for name in names):
        raise UserError(f"{where}: architectures names {', '.join(names)}; only {architecture} is supported")


def _refuse_foreign_code(config: dict[str, Any], where: str) -> None:
    code = config.get("auto_map")
    if code:
        named = next(iter(code.values()), None) if isinstance(code, dict) else code
        raise UserError(
            f"{where}: auto_map names code of the model's own ({_shown(named)}), which may compute something else and "
            "is never run here; remove the key if the weights are those of a plain model"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
