"""The published 2B and 4B, written out from their config files and the paper: configs, tensor names and shapes.

Nothing here comes from the project's own tables, which are compared with it.
"""

from typing import Any

from torch import Tensor


def layers(count: int, full: tuple[int, ...], windows: tuple[int, ...]) -> list[str]:
    """layer_types with JetBlocks in all other layers."""
    return ["attn" if i in full else "swa" if i in windows else "jet" for i in range(count)]


def config(jet: dict[str, Any], window: int, **sizes: Any) -> dict[str, Any]:
    """A published config.json, without the version of transformers and the names of the code files."""
    published = {"mode": "chunk", "norm_eps": "1e-5", "conv_size": 4, "dconv_generator_reduction": 8}
    return {
        "architectures": ["JetNemotronForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "efficient_attention_config": {
            "jet": {**published, "dconv_implementation": "triton", **jet},
            "swa": {"window_size": window},
        },
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "jet_nemotron",
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
        "vocab_size": 151936,
        **sizes,
    }


CONFIGS = {
    "Jet-Nemotron-2B": config(
        {"num_heads": 12, "head_dim": 96, "expand_v": 2.6666666667},
        1152,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        max_window_layers=28,
        num_attention_heads=12,
        max_position_embeddings=131072,
        layer_types=layers(28, (14, 19), (20, 21)),
    ),
    "Jet-Nemotron-4B": config(
        {"num_heads": 16, "head_dim": 128, "expand_v": 2},
        2048,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        max_window_layers=36,
        num_attention_heads=16,
        max_position_embeddings=32768,
        layer_types=layers(36, (17, 20, 32), (5, 16, 19, 21, 22, 25, 27)),
    ),
}
BILLIONS = {"Jet-Nemotron-2B": 1.965, "Jet-Nemotron-4B": 3.960}
KEY_WIDTH, VALUE_WIDTH = {"Jet-Nemotron-2B": 96, "Jet-Nemotron-4B": 128}, 256  # per head of a JetBlock
HEAD_DIM, KV_HEADS = 128, 2  # of the softmax layers


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the model's safetensors files. The LM head is the embedding and is not stored."""
    config = CONFIGS[name]
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    table = {"model.embed_tokens.weight": (151936, hidden), "model.norm.weight": (hidden,)}
    for i, kind in enumerate(config["layer_types"]):
        mixer = jet_block(name) if kind == "jet" else softmax(config)
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (mlp, hidden),
            "mlp.up_proj.weight": (mlp, hidden),
            "mlp.down_proj.weight": (hidden, mlp),
            **{f"self_attn.{key}": shape for key, shape in mixer.items()},
        }
        table |= {f"model.layers.{i}.{key}": shape for key, shape in layer.items()}
    return table


def softmax(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Qwen2's attention: biases on Q, K and V."""
    hidden, queries, keys = config["hidden_size"], config["num_attention_heads"] * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {
        "q_proj.weight": (queries, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "q_proj.bias": (queries,),
        "k_proj.bias": (keys,),
        "v_proj.bias": (keys,),
        "o_proj.weight": (hidden, queries),
    }


def jet_block(name: str) -> dict[str, tuple[int, ...]]:
    """Heads h, keys of d_k, values of 256: the generator makes 4 taps per value channel out of an eighth as many."""
    heads, hidden = CONFIGS[name]["num_attention_heads"], CONFIGS[name]["hidden_size"]  # as many heads as softmax has
    keys, values = heads * KEY_WIDTH[name], heads * VALUE_WIDTH
    return {
        "q_proj.weight": (keys, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (values, hidden),
        "g_proj.weight": (values, hidden),
        "o_proj.weight": (hidden, values),
        "a_proj.weight": (heads, hidden),
        "b_proj.weight": (heads, hidden),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "o_norm.weight": (VALUE_WIDTH,),
        "dynamic_conv1d.kernel_generator.w1.weight": (values // 8, hidden),
        "dynamic_conv1d.kernel_generator.w2.weight": (values * 4, values // 8),
        "dynamic_conv1d.kernel_generator.w2.bias": (values * 4,),
    }


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
