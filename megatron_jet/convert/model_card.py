"""README.md of an exported model."""

from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.layer_plan import split_entry
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.results import Scores

# Licences of known base models; the weights of a student derive from its teacher's.
BASE_LICENCES = {
    "Qwen2.5-3B": "Qwen Research License (research only)",
    "Qwen2.5-1.5B": "Apache-2.0",
    "bundled:tiny": "Apache-2.0",
}
CONTEXT = 65536


def model_card(model: ModelConfig, *, teacher: str, recipe: str, scores: Scores | None = None) -> str:
    """Text of README.md: what the model is made of, where it comes from, its licence and how to load it."""
    name = teacher.rstrip("/").rpartition("/")[2]
    licence = BASE_LICENCES.get(name, f"as the base model's: see the licence of {name}")
    cost = model_cost(model, CONTEXT)
    kinds = sorted({split_entry(entry)[0] for entry in model.layer_plan})
    counts = ", ".join(f"{sum(split_entry(e)[0] == kind for e in model.layer_plan)} x {kind}" for kind in kinds)
    lines = [
        f"# Hybrid model from {name}",
        "",
        "Made by Post Neural Architecture Search (PostNAS, arXiv 2508.15884) with Megatron-Jet, "
        f"recipe `{recipe}`, from the base model {name}.",
        "",
        f"- layers: {model.num_layers} ({counts})",
        f"- layer plan: {', '.join(model.layer_plan)}",
        f"- parameters: {cost.total_params:,}",
        f"- cache at {CONTEXT:,} tokens: {cost.cache_bytes / 2**20:.2f} MiB per sequence (16-bit K/V, fp32 states)",
        f"- licence of the base model: {licence}",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)",
        "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)  # it reads config.json as well",
        "```",
    ]
    if scores is not None:
        lines += ["", "| held-out set | accuracy | loss (nats per token) |", "|---|---|---|"]
        for name, loss in scores.loss.items():
            accuracy = f"{scores.accuracy[name]:.3f}" if name in scores.accuracy else ""
            lines.append(f"| {name} | {accuracy} | {loss:.3f} |")
    return "\n".join(lines) + "\n"
