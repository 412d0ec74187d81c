"""Names of a model's parameters, as `trainable` patterns meet them, before there is a model. No torch."""

from collections.abc import Iterable

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate import is_trainable
from megatron_jet.configs.model import ModelConfig

_AROUND_MIXER = (
    "input_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


def parameter_names(model: ModelConfig, choice: str | None = None) -> set[str]:
    """Names of all parameters, whatever the layout.

    Args:
        model: the model.
        choice: of a supernet, the plan entry that every layer has beside full attention.
    """
    names = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    if not model.tie_word_embeddings:
        names.add("output_layer.weight")
    for layer, entry in enumerate(model.layer_plan):
        paths = {entry: ""} if choice is None else {path: f"paths.{path}." for path in ("attn", choice)}
        for path, prefix in paths.items():
            tensors = model.mixer_of(path).tensor_names(model.shape)
            names |= {f"decoder.layers.{layer}.self_attention.{prefix}{tensor}" for tensor in tensors}
        names |= {f"decoder.layers.{layer}.{name}" for name in _AROUND_MIXER}
    return names


def check_trainable(where: str, patterns: tuple[str, ...], models: Iterable[set[str]]) -> None:
    """Raise UserError when a pattern that is to train something matches nothing in any of the models, or when one of
    them has nothing left to train. What is to be frozen may be missing: not every model has every part.

    Args:
        where: the config key.
        models: names of every model that trains with these patterns.
    """
    models = list(models)
    for pattern in patterns:
        wanted = not pattern.startswith("!")
        if wanted and not any(is_trainable(name, (pattern,)) for names in models for name in names):
            raise UserError(
                f"{where}: '{pattern}' matches no parameter; names look like {_example(models[0])}, and * stands for "
                "any part"
            )
    if not all(any(is_trainable(name, patterns) for name in names) for names in models):
        raise UserError(f"{where}: {list(patterns)} leave nothing to train")


def _example(names: set[str]) -> str:
    return min(name for name in names if ".self_attention." in name)
