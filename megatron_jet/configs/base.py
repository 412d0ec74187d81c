"""Strict frozen base model of every config, cluster file and result."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_jet.configs.errors import UserError

# Pydantic's words for these are about Python types.
_IN_WORDS = {
    **dict.fromkeys(("tuple_type", "list_type"), "write a list, for example [a, b]"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "write a mapping, one `key: value` per line"),
}


class StrictModel(BaseModel):
    """Frozen, unknown keys are errors. `parse` turns pydantic's report into one line per problem."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @classmethod
    def parse(cls, data: Any, where: str = "") -> Self:
        """Validate `data`.

        Args:
            data: a mapping (parsed YAML or JSON).
            where: names the source in the message, for example a file name.

        Raises:
            UserError: one line that names each wrong key and what is wrong with it.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(describe_validation_error(error, where or cls.__name__, cls)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, `None` fields kept."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).model_validate({**{k: getattr(self, k) for k in type(self).model_fields}, **changes})


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
