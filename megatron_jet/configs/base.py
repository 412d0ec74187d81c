"""Strict frozen base model of every config, cluster file and result."""

import math
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import MAX_NESTING, nested_too_deeply

LARGEST = 2**63 - 1  # of whole numbers: what files, tensors and counters of 64 bits hold

# Pydantic's words for these are about Python types.
_IN_WORDS = {
    **dict.fromkeys(("tuple_type", "list_type"), "write a list, for example [a, b]"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "write a mapping, one `key: value` per line"),
}


def _weights[K](weights: dict[K, float]) -> dict[K, float]:
    total = sum(weights.values())
    if any(weight < 0 for weight in weights.values()) or not 0 < total < math.inf:
        raise ValueError("give non-negative weights, at least one above 0 (and finite in sum)")
    return weights


_Key = TypeVar("_Key")
# Weights by name, such as a blend of sources. They need not sum to 1. (No `type` statement: the oldest pydantic that
# pyproject.toml promises knows no generic one.)
Weights = Annotated[dict[_Key, float], AfterValidator(_weights)]
Share = Annotated[float, Field(ge=0)]


class StrictModel(BaseModel):
    """Frozen; unknown keys are errors; numbers are finite. `parse` makes one line of all that pydantic reports."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def parse(cls, data: Any, where: str = "") -> Self:
        """Validate `data`.

        Args:
            data: a mapping (parsed YAML or JSON).
            where: names the source in the message, for example a file name.

        Raises:
            UserError: one line that names each wrong key and what is wrong with it.
        """
        where = where or cls.__name__
        check_plain(data, where)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(describe_validation_error(error, where, cls)) from None
        except UserError as error:  # of a validator of ours
            raise UserError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, `None` fields kept."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).model_validate({**{k: getattr(self, k) for k in type(self).model_fields}, **changes})


class ResultModel(StrictModel):
    """What programs wrote or worked out: its numbers are whatever arithmetic gave, NaN and infinity included."""

    model_config = StrictModel.model_config | {"allow_inf_nan": True}


def check_plain(data: Any, where: str) -> None:
    """Raise UserError for what no field of ours can mean: endless nesting, whole numbers beyond 64 bits, texts that no
    path, command or file can hold."""
    if nested_too_deeply(data):
        raise UserError(f"{where}: is nested more than {MAX_NESTING} levels deep")
    open_items = [("", data)]
    while open_items:
        key, value = open_items.pop()
        if isinstance(value, dict):
            for name, item in value.items():
                _check_scalar(name, key or "(whole)", where)
                open_items.append((f"{key}.{name}" if key else str(name), item))
        elif isinstance(value, list | tuple):
            open_items += [(f"{key}.{i}" if key else str(i), item) for i, item in enumerate(value)]
        else:
            _check_scalar(value, key or "(whole)", where)


def _check_scalar(value: Any, key: str, where: str) -> None:
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{where}: {key}: a whole number beyond 64 bits")
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise UserError(f"{where}: {key}: {value!r} holds what is no text (a zero byte, or half a character)")


def describe_validation_error(error: ValidationError, where: str, cls: type[BaseModel] | None = None) -> str:
    """One line for a pydantic error: `where: key: message; key: message`, with near names for unknown keys."""
    import difflib

    parts = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(whole)"
        message = _IN_WORDS.get(item["type"]) or item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = _known_keys(cls, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            message = "unknown key" + (f", did you mean '{near[0]}'?" if near else "")
        elif item["type"] != "missing" and not isinstance(item["input"], dict):
            message += f" (got {item['input']!r})"
        parts.append(f"{key}: {message}")
    return f"{where}: " + "; ".join(parts)


def _known_keys(cls: type[BaseModel] | None, path: tuple) -> list[str]:
    for part in path:
        field = cls.model_fields.get(part) if cls is not None and isinstance(part, str) else None
        cls = field.annotation if field is not None and isinstance(field.annotation, type) else None
    return list(cls.model_fields) if cls is not None and issubclass(cls, BaseModel) else []
