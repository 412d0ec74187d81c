"""The output directory: made as a whole or not at all, and `--force` replaces earlier outputs only."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import temporary_beside
from megatron_jet.data.index import SPLITS

INDEX = "index.json"


def check_output(out: Path, inputs: Iterable[Path], force: bool) -> None:
    """Raise UserError when `out` is there already and may not be replaced.

    Args:
        inputs: files and folders that are read.
        force: the user wants an earlier output replaced.
    """
    if not out.exists():
        return
    if not force:
        raise UserError(f"{out} exists; remove it or give --force")
    target = out.resolve()
    for path in inputs:
        if path.resolve().is_relative_to(target):
            raise UserError(f"{out}: the output would replace the input {path}; choose another output")
    why = _foreign(out)
    if why:
        raise UserError(f"{out} is not a prepared directory ({why}); --force replaces nothing else")


def _foreign(out: Path) -> str | None:
    """Why a path is nothing that was prepared here; None if it may be, or is an empty folder."""
    if not out.is_dir():
        return "it is a file"
    names = sorted(path.name for path in out.iterdir())
    if names and INDEX not in names:
        return f"it has no {INDEX}"
    strangers = [name for name in names if name not in (INDEX, *SPLITS)]
    return f"{strangers[0]} is in it" if strangers else None


@contextmanager
def directory_for(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` when the block ends well and is gone when it does not.

    Raises:
        UserError: it cannot be written.
    """
    target = out.resolve()  # of a link the folder it names is replaced
    temporary = target.with_name(f".{target.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _replace(target, temporary)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(out: Path, new: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = temporary_beside(out)
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
