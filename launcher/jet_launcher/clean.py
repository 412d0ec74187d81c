"""Freeing disk: checkpoints that nothing needs any more, or a whole run."""

import shutil
from pathlib import Path

from jet_launcher.run_directory import RunDirectory
from jet_launcher.stage_status import DONE, read_run
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json
from megatron_jet.configs.lock import lock_holder


def removable(run: RunDirectory, everything: bool) -> list[Path]:
    """What `clean` would remove, largest unit each.

    Args:
        everything: the run directory itself; otherwise the checkpoints of finished stages, except those that a result
            names (later stages start from them).

    Raises:
        UserError: somebody works in the run directory.
    """
    holder = lock_holder(run.lock_file)
    if holder is not None:
        raise UserError(f"{run.id} is running (process {holder.pid} on {holder.host}); `cancel {run.id}` first")
    if everything:
        # A run in a cluster's job directory has a link in runs/, which goes with it.
        return [run.path.resolve(), *([run.path] if run.path.is_symlink() else [])]
    kept = _named_checkpoints(run)
    found = []
    for status in read_run(run):
        if status.state != DONE:
            continue
        for folder in sorted(run.stage(status.stage).rglob("checkpoints")):
            if folder.is_dir():
                found += _outside(folder, kept)
    return found


def size_of(path: Path) -> int:
    """Bytes under `path`; none for a link."""
    if path.is_symlink():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def remove(path: Path) -> None:
    """Delete a file or a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _named_checkpoints(run: RunDirectory) -> list[Path]:
    """Every path in the results that exists in the run directory."""
    kept = []
    for result in run.path.glob("stages/*/result.json"):
        for value in _strings(read_json(result)):
            path = run.path / value
            if value and not Path(value).is_absolute() and path.exists():
                kept.append(path.resolve())
    return kept


def _strings(node: object) -> list[str]:
    if isinstance(node, str):
        return [node] if len(node) < 256 and "\0" not in node else []
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [text for value in values for text in _strings(value)]


def _outside(folder: Path, kept: list[Path]) -> list[Path]:
    """`folder`, or those of its entries that hold no kept path and lie in none."""
    here = folder.resolve()
    if any(here == path or here.is_relative_to(path) for path in kept):
        return []
    if not any(path.is_relative_to(here) for path in kept):
        return [folder]
    return [part for entry in sorted(folder.iterdir()) for part in _outside(entry, kept)]
