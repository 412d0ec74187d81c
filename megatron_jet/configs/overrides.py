"""`key.sub=value` overrides and YAML files, typed by the config they land in."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron_jet.configs.errors import UserError, usage_errors
from megatron_jet.configs.files import open_file
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.yaml_loader import BoundedLoader, RefusedYaml, parse_yaml


def parse_value(text: str) -> Any:
    """A YAML scalar or flow collection: `3`, `1e-3`, `true`, `[a, b]`, `null`. Anything else stays a string.

    Raises:
        UserError: a key given twice, or no bounds (yaml_loader.py).
    """
    try:
        return float(text) if _looks_like_float(text) else parse_yaml(text)
    except RefusedYaml as error:
        raise UserError(f"'{text[:60]}': {error}") from None
    except yaml.YAMLError:
        return text


def _looks_like_float(text: str) -> bool:
    """YAML 1.1 reads `1e-3` as a string; users mean a number."""
    if not any(c in text for c in "eE") or text[:1] not in "+-.0123456789":
        return False
    try:
        float(text)
    except ValueError:
        return False
    return True


@usage_errors()
def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """A validated copy of `config` with `key.sub=value` changes.

    Raises:
        UserError: no '=' in an override, an unknown key (with the nearest known one), or a value of the wrong type.
    """
    data = config.to_dict()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override '{override}': write key.sub=value")
        _set(data, key.split("."), parse_value(text), override)
    return RunConfig.parse(data, "overrides")


def _set(node: Any, path: list[str], value: Any, override: str) -> None:
    for depth, part in enumerate(path):
        if isinstance(node, list):
            node, part = _list_item(node, part, override)
        if not isinstance(node, dict):
            raise UserError(f"override '{override}': {'.'.join(path[:depth])} has no keys")
        last = depth == len(path) - 1
        if part not in node and not (last and _free_form(path)):
            near = difflib.get_close_matches(part, list(node), n=1)
            hint = f", did you mean '{near[0]}'?" if near else f"; known: {', '.join(map(str, node))}"
            raise UserError(f"override '{override}': unknown key '{'.'.join(path[: depth + 1])}'{hint}")
        if last:
            node[part] = value
        else:
            if node[part] is None:
                raise UserError(f"override '{override}': {'.'.join(path[: depth + 1])} is not set; give it as a whole")
            node = node[part]


def _list_item(node: list, part: str, override: str) -> tuple[Any, str]:
    raise UserError(f"override '{override}': give the list as a whole, for example key=[a, b] (no item '{part}')")


def _free_form(path: list[str]) -> bool:
    """Mappings whose keys are the user's own: blend weights by source, full-layer counts, mixers by name."""
    return len(path) >= 2 and path[-2] in ("blend", "full_layers", "mixers")


def load_yaml(path: str | Path, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """Parse a YAML file. Raises UserError that names the file and the line."""
    try:
        with open_file(path) as file:
            return parse_yaml(file.read(), loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def dump_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_recipe` reads back to an equal config."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, width=120)
