"""An output directory that is there whole or not at all. The one place that makes them."""

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import temporary_beside
from megatron_jet.configs.lock import exclusive
from megatron_jet.configs.signals import Interrupted
from megatron_jet.configs.ticks import tick

OLD = ".old"  # ends the name of a directory that is being replaced
SYNCED_AT_ONCE = 16


@contextmanager
def replaced_directory(path: str | Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A temporary directory that takes the place of `path` when the block ends well, and vanishes when it does not.

    One process at a time writes a path: another one is refused, whose sweeping would take this one's files away.

    Its files have reached the disk before it gets its name. What a kill left of an earlier attempt at the same path is
    removed, and the directory that was there before comes back if the kill fell between the two renames. What a link
    points to is replaced, not the link.

    Args:
        path: of the directory.
        check: called once no other process can make `path` any more; may raise.

    Raises:
        UserError: it cannot be written, or another process writes it.
    """
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    with _one_writer(path):
        check()
        with _replaced(path) as temporary:
            yield temporary


@contextmanager
def _one_writer(target: Path) -> Iterator[None]:
    """Hold the lock file beside `target`, hidden, and take it away again."""
    lock = target.with_name(f".{target.name}.lock")
    while True:
        with exclusive(lock, "wait for it to end, or choose another output", target) as handle:
            # The one before may have removed the file after this process opened it: what is locked has no name then.
            if not _is_named(handle, lock):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_named(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """The above, for the one writer."""
    prefix = f".{path.name}.partial-"
    try:
        for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
            if leftover.suffix == OLD and not path.exists():
                os.rename(leftover, path)
            else:
                shutil.rmtree(leftover, ignore_errors=True)
        temporary = temporary_beside(path)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    old = temporary.with_name(temporary.name + OLD)
    try:
        yield temporary
        _sync(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _sync_one(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt | Interrupted):
            raise
        if interrupted(error):
            raise KeyboardInterrupt from None
        problem = write_problem(error)
        if problem is not None:
            raise UserError(f"{path}: cannot be written ({problem})") from None
        raise


def _sync(directory: Path) -> None:
    """Wait until everything below a directory is on the disk. Many files at once share the journal's commits."""
    folders = [Path(folder) for folder, _, _ in os.walk(directory)]
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    with ThreadPoolExecutor(max_workers=SYNCED_AT_ONCE) as workers:
        for _ in workers.map(_sync_one, files):
            tick()
        list(workers.map(_sync_one, folders))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C or a signal is behind an error: torch's writer, left in the middle of a file, raises its own."""
    return any(isinstance(cause, KeyboardInterrupt | Interrupted) for cause in _causes(error))


def write_problem(error: BaseException) -> str | None:
    """What the file system said, if that is why writing failed; torch and safetensors wrap it."""
    if isinstance(error, UserError):
        return None
    for cause in _causes(error):
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
    # SafetensorError has no place of its own to ask for errno; by name, since configs/ imports no safetensors.
    wrapped = type(error).__name__ == "SafetensorError" or "inline_container" in str(error)
    return f"disk full? {one_line(error)}" if wrapped else None


def stop_if_interrupted(error: BaseException) -> None:
    """Raise what stopped us, if that is behind an error that a library made of it. For readers of foreign files."""
    for cause in _causes(error):
        if isinstance(cause, KeyboardInterrupt | Interrupted):
            raise cause from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from; torch's CheckpointException keeps those of all ranks in `failures`, and may
    be the context of one of them."""
    waiting, seen = [error], set()
    while waiting:
        cause = waiting.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        failures = getattr(cause, "failures", None)
        waiting += [failure for failure, *_ in failures.values()] if isinstance(failures, dict) else []
        further = cause.__cause__ or cause.__context__
        if further is not None:
            waiting.append(further)


def one_line(error: BaseException) -> str:
    """A message's text on one line, cut to a readable length."""
    return " ".join(str(error).split())[:200]
