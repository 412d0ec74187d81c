"""README.md of an exported model."""

from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.layer_plan import split_entry
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.results import PlacementResult, Scores
from megatron_jet.convert.hf.configuration_megatron_jet import OLDEST_TORCH, OLDEST_TRANSFORMERS

# Licences of known base models; the weights of a student derive from its teacher's. Source: their pages on the Hub.
BASE_LICENCES = {
    "Qwen2.5-0.5B": "Apache-2.0",
    "Qwen2.5-1.5B": "Apache-2.0",
    "Qwen2.5-3B": "Qwen Research License (research only)",
    "Qwen2.5-7B": "Apache-2.0",
    "Qwen3-1.7B": "Apache-2.0",
    "Llama-3.2-1B": "Llama 3.2 Community License",
    "Llama-3.2-3B": "Llama 3.2 Community License",
    "bundled:tiny": "Apache-2.0",
}
VARIANTS = ("-Instruct", "-Base")  # of a base model, under the same licence
CONTEXT = 65536
MADE = {True: "Made by Post Neural Architecture Search (PostNAS, arXiv 2508.15884)", False: "Distilled"}


def model_card(
    model: ModelConfig,
    *,
    command: str | None,
    teacher: str | None = None,
    recipe: str | None = None,
    placement: PlacementResult | None = None,
    scores: Scores | None = None,
    scored_on: str = "held-out data",
) -> str:
    """Text of README.md: architecture, placement and how it was found, scores, origin, licence, and how to load it.

    Args:
        model: what is exported.
        command: that made it; None: it is left out.
        teacher: name or path of the base model; None when a checkpoint does not say where it comes from.
        recipe: of the run that made it, if one did.
        placement: what that run's search found; None: the recipe gave the layer plan.
        scores: of this model.
        scored_on: which data that was, and how much.
    """
    name = teacher.rstrip("/").rpartition("/")[2] if teacher else None
    hybrid = any(entry != "attn" for entry in model.layer_plan)
    lines = [f"# {'Hybrid' if hybrid else 'Full-attention'} model" + (f" from {name}" if name else ""), ""]
    if recipe is not None:
        lines.append(f"{MADE[placement is not None]} with Megatron-Jet, recipe `{recipe}`, from the base model {name}.")
    else:
        lines.append("Converted from a Megatron checkpoint by Megatron-Jet.")
    lines += ["", *_architecture(model)]
    if placement is not None:
        lines.append(f"- placement: {_how_found(placement)}")
    elif hybrid and recipe is not None:
        lines.append("- placement: given by the recipe (`student_plan`), not searched for")
    elif hybrid:
        lines.append("- placement: as in the checkpoint, which does not say how it was found")
    lines.append(f"- needs: {_needs(hybrid)}")
    lines.append(f"- licence of the base model: {_licence(name)}")
    if command is not None:
        lines.append(f"- command: `{command}`")
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)",
        "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)  # it reads config.json as well",
        "```",
    ]
    return "\n".join(lines + _score_table(scores, scored_on)) + "\n"


def _architecture(model: ModelConfig) -> list[str]:
    """Sizes, and which layer is what (0-based)."""
    cost = model_cost(model, CONTEXT)
    entries = list(dict.fromkeys(model.layer_plan))
    layers = {entry: [i for i, other in enumerate(model.layer_plan) if other == entry] for entry in entries}
    lines = [f"- layers: {model.num_layers}, numbered from 0"]
    for entry in sorted(entries, key=lambda entry: len(layers[entry])):
        kind, window = split_entry(entry)
        settings = model.mixers[kind].to_dict() if kind in model.mixers else {}
        what = {"attn": "full attention", "swa": f"sliding-window attention of {window} tokens"}.get(kind, f"`{kind}`")
        sizes = ", ".join(f"{key}={value}" for key, value in settings.items())
        where = ", ".join(map(str, layers[entry]))
        lines.append(f"  - {len(layers[entry])} x {what}: {where}" + (f" ({sizes})" if sizes else ""))
    return [
        *lines,
        f"- hidden size {model.hidden_size}, MLP {model.intermediate_size}, {model.num_attention_heads} heads, "
        f"{model.num_key_value_heads} key/value heads of {model.head_dim}, vocabulary {model.vocab_size}",
        f"- parameters: {cost.total_params:,}",
        f"- cache at {CONTEXT:,} tokens: {cost.cache_bytes / 2**20:.2f} MiB per sequence (16-bit K/V, fp32 states)",
    ]


def _needs(hybrid: bool) -> str:
    if not hybrid:
        return "torch, and a transformers that knows the `model_type` of config.json"
    return f"torch >= {OLDEST_TORCH} and transformers >= {OLDEST_TRANSFORMERS}; the model's code is in this directory"


def _how_found(placement: PlacementResult) -> str:
    """In words; the run's report holds the evidence."""
    width = max((len(beam.kept) for beam in placement.beam), default=0)
    text = (
        f"full attention by beam search (width {width}) in a once-for-all supernet, for accuracy on "
        f"`{placement.objective}` and, where it is equal, loss"
    )
    if placement.swa:
        text += f"; windows by beam search for the lowest loss on `{placement.swa_objective}`, full layers fixed"
    return text + f"; evenly spaced full attention would be in {', '.join(map(str, placement.uniform)) or 'no layer'}"


def _licence(name: str | None) -> str:
    if name is None:
        return "not recorded in the checkpoint; ask where it comes from"
    for variant in VARIANTS:
        name = name.removesuffix(variant)
    return BASE_LICENCES.get(name, f"as the base model's: see the licence of {name}")


def _score_table(scores: Scores | None, scored_on: str) -> list[str]:
    if scores is None:
        return []
    lines = ["", f"Scores on {scored_on}:", "", "| set | accuracy | loss (nats per token) |", "|---|---|---|"]
    for name, loss in scores.loss.items():
        accuracy = f"{scores.accuracy[name]:.3f}" if name in scores.accuracy else ""
        error = f" ± {scores.error[name]:.3f}" if accuracy and name in scores.error else ""
        lines.append(f"| {name} | {accuracy}{error} | {loss:.3f} |")
    return lines
