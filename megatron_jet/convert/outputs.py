"""May an output directory be made, and may what is there be replaced? `--force` replaces earlier outputs only."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from megatron_jet.configs.checksums import CHECKSUMS
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json
from megatron_jet.configs.hf_format import ARCHITECTURES
from megatron_jet.convert.companions import CARD, COMPANIONS, is_companion, modeling_files
from megatron_jet.convert.global_checkpoint import COMPLETE_MARK
from megatron_jet.convert.hf_files import INDEX, SINGLE

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
CHECKPOINT_FILES = {COMPLETE_MARK, ".metadata", "model_config.json", CHECKSUMS}


def check_output(path: Path, source: Path, force: bool, foreign: Callable[[Path], str | None]) -> None:
    """Raise UserError when an output is there already and may not be replaced.

    Args:
        path: the output directory.
        source: what is read.
        force: the user wants an earlier output replaced.
        foreign: says of a directory why it is no earlier output of this kind, or None.
    """
    target, origin = os.path.realpath(path), os.path.realpath(source)
    if Path(origin).is_relative_to(target):
        raise UserError(f"{path}: the output would replace the input {source}; choose another output")
    if (source / COMPLETE_MARK).is_file() and Path(target).is_relative_to(origin):
        raise UserError(f"{path}: the output would lie inside the checkpoint {source}; choose another output")
    if not path.exists():
        return
    if not force:
        raise UserError(f"{path} exists; choose another output or pass --force to replace it")
    if path.is_dir() and not any(path.iterdir()):
        return
    why = foreign(path) if path.is_dir() else "it is a file"
    if why is not None:
        raise UserError(f"{path} is not an earlier output ({why}); --force replaces nothing else")


def not_an_export(directory: Path) -> str | None:
    """Why a directory is not one that `export_hf` made, in words; None if it may be one.

    It needs the config.json of a model, weights, and nothing that an export does not hold.
    """
    config = _mapping(directory / "config.json")
    if config.get("model_type") not in list(ARCHITECTURES):  # a list: what was read may be anything
        return "it has no config.json of a model"
    if not (directory / SINGLE).is_file() and not (directory / INDEX).is_file():
        return f"it has no {SINGLE}"
    code = {path.name for path in modeling_files()}
    return _stranger(
        directory,
        lambda path: path.name in {SINGLE, INDEX, CARD, *code} or SHARD.fullmatch(path.name) or is_companion(path),
    )


def not_an_import(directory: Path) -> str | None:
    """Why a directory is not one that `import_hf` made, in words; None if it may be one."""
    if "sharded_backend" not in _mapping(directory / COMPLETE_MARK):
        return f"it has no {COMPLETE_MARK} of a Megatron checkpoint"
    if not (directory / COMPANIONS / "config.json").is_file():
        return f"it was trained or made otherwise: it has no {COMPANIONS}/config.json"
    weights = lambda path: path.name in CHECKPOINT_FILES or path.suffix == ".distcp"  # noqa: E731
    why = _stranger(directory, weights, folders=(COMPANIONS,))
    return why or _stranger(directory / COMPANIONS, is_companion)


def _stranger(directory: Path, belongs: Callable[[Path], object], folders: tuple[str, ...] = ()) -> str | None:
    """Names the first thing in a directory that no such output holds. Links are none of ours: a cache has them."""
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or not (path.name in folders if path.is_dir() else belongs(path)):
            return f"{path.name} is in it"
    return None


def _mapping(path: Path) -> dict:
    """Content of a JSON file; empty where there is none or it is something else."""
    try:
        content = read_json(path)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}
