"""Rotary embedding settings of a config.json, under either name that transformers has for them. No torch."""

from typing import Any

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.families import RopeScaling

COMMON = ("rope_type", "type", "rope_theta")  # of every kind of rotary embedding


def rope_key(config: dict[str, Any], hybrid: bool) -> str:
    """Where the rotary embedding's settings are; transformers 5 writes rope_theta among them.

    A file that gives them under both names is read as its code reads it: for a plain model rope_scaling, whole, is what
    transformers takes; the hybrids' code takes rope_parameters.
    """
    names = ("rope_parameters", "rope_scaling") if hybrid else ("rope_scaling", "rope_parameters")
    return next((name for name in names if config.get(name)), names[0])


def rope_scaling(rope: dict[str, Any], where: str) -> dict[str, Any] | None:
    """Llama 3's scaling, or none. `where` names the file and the key."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{where}: RoPE scaling '{rope_type}' is not supported; known: default, llama3")
    names = RopeScaling.model_fields if rope_type == "llama3" else {}
    for key, value in rope.items():
        if key not in names and key not in COMMON and value is not None:
            if key == "partial_rotary_factor" and value == 1:
                continue
            raise UserError(
                f"{where}.{key}={value!r} is not understood for rope_type '{rope_type}'; remove it if unused"
            )
    return RopeScaling.parse({key: rope[key] for key in names if key in rope}, where).to_dict() if names else None


def rope_keys(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """What config.json says of a scaling."""
    return None if scaling is None else {"rope_type": "llama3", **scaling.to_dict()}
