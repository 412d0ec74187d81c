"""The layer plan: one entry per layer that names its mixer, such as `("jet", "attn", "swa:1152", ...)`."""

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.mixers.registry import LINEAR_MIXERS, mixer_config_class

LayerPlan = tuple[str, ...]


def split_entry(entry: str) -> tuple[str, int | None]:
    """`"swa:1152"` -> `("swa", 1152)`, `"jet"` -> `("jet", None)`.

    Raises:
        UserError: unknown mixer, a window that is missing, not a whole number or below 1, or one where none belongs.
    """
    kind, colon, argument = entry.partition(":")
    mixer_config_class(kind)
    if kind != "swa":
        if colon:
            raise UserError(f"layer plan entry '{entry}': only swa takes a window")
        return kind, None
    if not argument.isdigit() or int(argument) < 1:
        raise UserError(f"layer plan entry '{entry}': write swa:<window> with a window of 1 or more tokens")
    return kind, int(argument)


def check_plan(plan: LayerPlan, num_layers: int) -> None:
    """Raise UserError when an entry is bad or the plan has not exactly `num_layers` entries."""
    if len(plan) != num_layers:
        raise UserError(f"layer plan has {len(plan)} entries but the model has {num_layers} layers")
    for entry in plan:
        split_entry(entry)


def hybrid_plan(
    num_layers: int, linear: str, full: tuple[int, ...], windows: dict[int, int] | None = None
) -> LayerPlan:
    """A plan with `linear` everywhere but at the full-attention layers and the sliding-window layers (0-based)."""
    windows = windows or {}
    for index in (*full, *windows):
        if not 0 <= index < num_layers:
            raise UserError(f"layer {index} does not exist in a model of {num_layers} layers")
    return tuple("attn" if i in full else f"swa:{windows[i]}" if i in windows else linear for i in range(num_layers))


def uniform_placement(num_layers: int, budget: int, phase: float = 0.5) -> tuple[int, ...]:
    """`budget` layers at equal spacing; phase 0.5 centres each in its span, 0 starts at layer 0.

    The baseline of the paper's figure 5b. Raises UserError when the budget does not fit.
    """
    if not 0 <= budget <= num_layers:
        raise UserError(f"budget {budget} does not fit a model of {num_layers} layers")
    return tuple(sorted({int((i + phase) * num_layers / budget) for i in range(budget)})) if budget else ()


def uniform_phases(num_layers: int, budget: int) -> list[tuple[int, ...]]:
    """Every equally spaced placement: all shifts of a grid with spacing num_layers // budget."""
    spacing = num_layers // budget if budget else 0
    return [tuple(start + i * spacing for i in range(budget)) for start in range(spacing)]


def full_layers(plan: LayerPlan) -> tuple[int, ...]:
    """0-based indices of the full-attention layers."""
    return tuple(i for i, entry in enumerate(plan) if entry == "attn")


def linear_kinds(plan: LayerPlan) -> tuple[str, ...]:
    """The linear mixers of a plan, each once, in the order of its layers. Raises UserError for a bad entry."""
    kinds = dict.fromkeys(split_entry(entry)[0] for entry in plan)
    return tuple(kind for kind in kinds if kind in LINEAR_MIXERS)


def linear_layers(plan: LayerPlan) -> tuple[int, ...]:
    """0-based indices of the layers with a linear mixer."""
    return tuple(i for i, entry in enumerate(plan) if split_entry(entry)[0] in LINEAR_MIXERS)
