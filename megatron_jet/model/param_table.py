"""Every tensor of a model, as checkpoint key and as Hugging Face names. The one table used in both directions."""

from megatron_jet.configs.layer_plan import split_entry
from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers.params import ParamRow
from megatron_jet.mixers.registry import mixer_definition


def param_table(model: ModelConfig) -> list[ParamRow]:
    """Rows of a whole model, in the order of an HF checkpoint. With tied embeddings there is no lm_head row."""
    vocab = (model.vocab_size, model.hidden_size)
    rows = [ParamRow("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (vocab,))]
    for layer in range(model.num_layers):
        rows += layer_rows(model, layer)
    rows.append(ParamRow("decoder.final_layernorm.weight", ("model.norm.weight",), ((model.hidden_size,),)))
    if not model.tie_word_embeddings:
        rows.append(ParamRow("output_layer.weight", ("lm_head.weight",), (vocab,)))
    return rows


def layer_rows(model: ModelConfig, layer: int) -> list[ParamRow]:
    """Rows of one decoder layer (0-based)."""
    h, ffn = model.hidden_size, model.intermediate_size
    rows = [
        ParamRow("input_layernorm.weight", ("input_layernorm.weight",), ((h,),)),
        *mixer_rows(model, model.layer_plan[layer]),
        ParamRow("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), ((h,),)),
        ParamRow(
            "mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ((ffn, h), (ffn, h)), "concat"
        ),
        ParamRow("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), ((h, ffn),)),
    ]
    return [row.prefixed(f"decoder.layers.{layer}.", f"model.layers.{layer}.") for row in rows]


def mixer_rows(model: ModelConfig, entry: str) -> list[ParamRow]:
    """Rows of the mixer that a plan entry names, relative to its layer."""
    rows = mixer_definition(split_entry(entry)[0]).hf_rows(model.mixer_of(entry), model)
    return [row.prefixed("self_attention.", "self_attn.") for row in rows]
