"""The hybrid model written a second time: numpy, fp64, one token at a time, from the equations and nothing else.

Oracle for the modeling code. It shares no code with the project, so a mistake would have to be made twice.
Sources: Qwen2 for the frame, Gated DeltaNet (2412.06464), GLA (2312.06635), Jet-Nemotron (2508.15884).
"""

import numpy as np

Weights = dict[str, np.ndarray]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(-abs(x))) + np.maximum(x, 0)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def l2_normalize(x):
    return x / np.sqrt((x**2).sum() + 1e-6)


def forward(config: dict, weights: Weights, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """One unpadded sequence.

    Args:
        config: contents of config.json.
        weights: by published name, fp64.
        tokens: [T].

    Returns:
        Logits [T, vocabulary], and the input of each layer and the final norm's output, [T, hidden] each.
    """
    h = weights["model.embed_tokens.weight"][tokens]
    hidden = []
    for layer, kind in enumerate(config["layer_types"]):
        hidden.append(h)
        w = {name.split(".", 3)[3]: x for name, x in weights.items() if name.startswith(f"model.layers.{layer}.")}
        x = rms_norm(h, w["input_layernorm.weight"], config["rms_norm_eps"])
        mixer = {name.removeprefix("self_attn."): y for name, y in w.items() if name.startswith("self_attn.")}
        settings = config["efficient_attention_config"].get(kind, {})
        if kind in ("attn", "swa"):
            h = h + attention(config, mixer, x, window_of(config, layer))
        else:
            h = h + {"jet": jet, "gated_delta_net": gated_delta_net, "gla": gla}[kind](settings, mixer, x)
        x = rms_norm(h, w["post_attention_layernorm.weight"], config["rms_norm_eps"])
        h = h + (silu(x @ w["mlp.gate_proj.weight"].T) * (x @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    h = rms_norm(h, weights["model.norm.weight"], config["rms_norm_eps"])
    hidden.append(h)
    return h @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T, hidden


def window_of(config: dict, layer: int) -> int | None:
    if config["layer_types"][layer] != "swa":
        return None
    windows = config.get("windows")
    return windows[layer] if windows else config["efficient_attention_config"]["swa"]["window_size"]


def attention(config: dict, w: Weights, x: np.ndarray, window: int | None) -> np.ndarray:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    projected = {}
    for name, count in (("q", heads), ("k", groups), ("v", groups)):
        bias = w.get(f"{name}_proj.bias", 0.0)
        projected[name] = (x @ w[f"{name}_proj.weight"].T + bias).reshape(len(x), count, dim)
        if f"{name}_norm.weight" in w:
            projected[name] = rms_norm(projected[name], w[f"{name}_norm.weight"], config["rms_norm_eps"])
    frequency = config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    for name in ("q", "k"):
        for t in range(len(x)):
            low, high = projected[name][t, :, : dim // 2].copy(), projected[name][t, :, dim // 2 :].copy()
            cos, sin = np.cos(t * frequency), np.sin(t * frequency)
            projected[name][t] = np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
    out = np.zeros((len(x), heads, dim))
    for t in range(len(x)):
        first = 0 if window is None else max(0, t - window + 1)
        for head in range(heads):
            group = head // (heads // groups)
            scores = projected["k"][first : t + 1, group] @ projected["q"][t, head] / np.sqrt(dim)
            probability = np.exp(scores - scores.max())
            out[t, head] = probability / probability.sum() @ projected["v"][first : t + 1, group]
    return out.reshape(len(x), -1) @ w["o_proj.weight"].T


def gated_output(settings: dict, w: Weights, x: np.ndarray, o: np.ndarray) -> np.ndarray:
    gate = (x @ w["g_proj.weight"].T).reshape(o.shape)
    o = rms_norm(o, w["o_norm.weight"], float(settings["norm_eps"])) * silu(gate)
    return o.reshape(len(x), -1) @ w["o_proj.weight"].T


def delta_rule(settings: dict, w: Weights, x: np.ndarray, q, k, v) -> np.ndarray:
    heads, d_k = settings["num_heads"], settings["head_dim"]
    q, k, v = (y.reshape(len(x), heads, -1) for y in (q, k, v))
    beta = sigmoid(x @ w["b_proj.weight"].T)
    g = -np.exp(w["A_log"]) * softplus(x @ w["a_proj.weight"].T + w["dt_bias"])
    o = np.zeros_like(v)
    for head in range(heads):
        state = np.zeros((d_k, v.shape[-1]))
        for t in range(len(x)):
            query, key = l2_normalize(q[t, head]), l2_normalize(k[t, head])
            state = np.exp(g[t, head]) * state
            state = state + np.outer(key, beta[t, head] * (v[t, head] - state.T @ key))
            o[t, head] = state.T @ query / np.sqrt(d_k)
    return gated_output(settings, w, x, o)


def jet(settings: dict, w: Weights, x: np.ndarray) -> np.ndarray:
    q, k, v = (x @ w[f"{name}_proj.weight"].T for name in "qkv")
    generator = "dynamic_conv1d.kernel_generator."
    bottleneck = silu(x @ w[generator + "w1.weight"].T)
    taps = bottleneck @ w[generator + "w2.weight"].T + w[generator + "w2.bias"]
    width = settings["conv_size"]
    taps = taps.reshape(len(x), v.shape[-1], width)
    out = np.zeros_like(v)
    for t in range(len(x)):
        for tap in range(width):
            source = t - (width - 1) + tap
            if source >= 0:
                out[t] += taps[t, :, tap] * v[source]
    return delta_rule(settings, w, x, silu(q), silu(k), silu(out))


def gated_delta_net(settings: dict, w: Weights, x: np.ndarray) -> np.ndarray:
    convolved = []
    for name in "qkv":
        y, taps = x @ w[f"{name}_proj.weight"].T, w[f"{name}_conv1d.weight"][:, 0]
        width = taps.shape[1]
        out = np.zeros_like(y)
        for t in range(len(x)):
            for tap in range(width):
                source = t - (width - 1) + tap
                if source >= 0:
                    out[t] += taps[:, tap] * y[source]
        convolved.append(silu(out))
    return delta_rule(settings, w, x, *convolved)


def gla(settings: dict, w: Weights, x: np.ndarray) -> np.ndarray:
    heads, d_k = settings["num_heads"], settings["head_dim"]
    q, k, v = ((x @ w[f"{name}_proj.weight"].T).reshape(len(x), heads, -1) for name in "qkv")
    logits = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    alpha = (sigmoid(logits) ** (1 / settings["gate_logit_normalizer"])).reshape(len(x), heads, d_k)
    o = np.zeros_like(v)
    for head in range(heads):
        state = np.zeros((d_k, v.shape[-1]))
        for t in range(len(x)):
            state = alpha[t, head][:, None] * state + np.outer(k[t, head], v[t, head])
            o[t, head] = state.T @ q[t, head] / np.sqrt(d_k)
    return gated_output(settings, w, x, o)
