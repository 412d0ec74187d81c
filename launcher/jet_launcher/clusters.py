"""Finding and reading cluster files."""

import difflib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from megatron_jet.configs.cluster import ClusterConfig, TunnelConfig
from megatron_jet.configs.errors import UserError, usage_errors
from megatron_jet.configs.files import home_expanded
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.yaml_loader import BoundedLoader

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "slurm" / "clusters"
_VARIABLE = re.compile(r"\$(\$?)\{([^}]*)\}")
# Shell code keeps its ${VAR} for the shell of the node.
_SHELL_FIELDS = (("setup",), ("preflight", "command"))


class _AsWritten(BoundedLoader):
    """Every value is the text that the file shows, and the field decides what it means.

    YAML itself reads the account 010203 as 4227, the time 12:30 as 750 and the version 1.10 as 1.1.
    """

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


@usage_errors()
def load_cluster(name_or_file: str, environment: Mapping[str, str] = os.environ) -> ClusterConfig:
    """The cluster of this name or in this file, with every `${VAR}` replaced.

    Args:
        name_or_file: a name in the user's config folder or in slurm/clusters (looked up in this order), or a path.
        environment: where `${VAR}` comes from: that of the login shell.

    Raises:
        UserError: no such cluster, not YAML, an unknown key or a bad value, or an unset variable.
    """
    path, data = read_cluster(name_or_file, environment)
    return ClusterConfig.parse(expand(data, environment, str(path)), str(path))


@usage_errors()
def read_cluster(name_or_file: str, environment: Mapping[str, str] = os.environ) -> tuple[Path, dict[str, Any]]:
    """A cluster file as it is written. Raises UserError when there is none or it is no YAML mapping."""
    path = find_cluster(name_or_file, environment)
    data = load_yaml(path, _AsWritten)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a cluster file is a mapping, one `field: value` per line")
    return path, data


@usage_errors()
def ssh_tunnel(name_or_file: str, environment: Mapping[str, str] = os.environ) -> TunnelConfig | None:
    """The tunnel of a cluster behind SSH; None for one that is here. Its `${VAR}` come from this machine."""
    path, data = read_cluster(name_or_file, environment)
    tunnel = data.get("tunnel")
    if not isinstance(tunnel, dict) or tunnel.get("kind") != "ssh":
        return None
    return TunnelConfig.parse(expand(tunnel, environment, str(path), ("tunnel",)), f"{path}: tunnel")


@usage_errors()
def find_cluster(name_or_file: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Path of the cluster file. Raises UserError that lists the known names."""
    if "/" in name_or_file or name_or_file.endswith((".yaml", ".yml")):
        path = home_expanded(name_or_file, "--cluster")
        if not path.is_file():
            raise UserError(f"{name_or_file}: no such cluster file")
        return path
    known = known_clusters(environment)
    if name_or_file not in known:
        near = difflib.get_close_matches(name_or_file, known, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(
            f"cluster '{name_or_file}' is not known; {hint}known: {', '.join(known)}. "
            f"Your own go to {user_folder(environment)}/NAME.yaml (start from slurm/clusters/example_h100.yaml)"
        )
    return known[name_or_file]


def known_clusters(environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Cluster files by name; the user's own hide shipped ones of the same name."""
    found: dict[str, Path] = {}
    for folder in (SHIPPED, user_folder(environment)):
        with suppress(PermissionError):  # in containers HOME may be somebody else's
            found.update({path.stem: path for path in sorted(folder.glob("*.yaml"))})
    return found


def user_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The user's own cluster files: $XDG_CONFIG_HOME (or ~/.config) /megatron_jet/clusters."""
    base = Path(environment.get("XDG_CONFIG_HOME") or environment.get("HOME", "~") + "/.config")
    with suppress(RuntimeError):  # containers may run as a user whom nobody knows
        base = base.expanduser()
    return base / "megatron_jet" / "clusters"


def expand(value: Any, environment: Mapping[str, str], where: str, path: tuple[str, ...] = ()) -> Any:
    """A copy with `${VAR}` replaced in every string but shell code; `$${VAR}` gives a literal `${VAR}`.

    Raises:
        UserError: an unset variable, or a `${...}` that names none.
    """
    if path in _SHELL_FIELDS:
        return value
    if isinstance(value, dict):
        return {key: expand(item, environment, where, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, environment, where, path) for item in value]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        escaped, name = match.groups()
        if escaped:
            return f"${{{name}}}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"{where}: {'.'.join(path)}: '{match.group()}' does not name an environment variable")
        if name not in environment:
            raise UserError(
                f"{where}: {'.'.join(path)}: ${{{name}}} is not set in your environment; export it, "
                f"or write $${{{name}}} to keep it as it is"
            )
        return environment[name]

    return _VARIABLE.sub(replacement, value)
