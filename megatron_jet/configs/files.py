"""Reading and writing small JSON files so that a kill at any moment leaves either the old file or the new one."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_jet.configs.errors import UserError

SCHEMA_VERSION = 1
SWEPT_AFTER = 86400.0  # seconds until what a killed writer left is swept
MAX_NESTING = 64  # levels of a JSON or YAML file; ours have ten, and readers that go down by themselves have an end


def os_error_line(error: OSError) -> str:
    """One line for whatever the file system refused: the path that it names, and why."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def describe_os_error(error: OSError, path: Path) -> str:
    """One line for a failed write."""
    if error.errno == errno.ENOSPC:
        return f"{path}: no space left on the disk; free some or give an --output on another one"
    return f"{path}: cannot be written ({error.strerror or error})"


def write_text(path: str | Path, text: str, mode: int = 0o666) -> None:
    """Replace `path` by `text` atomically (temporary file in the same directory, fsync, rename).

    Args:
        mode: permissions before the umask; 0o600 for what only its owner may read.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = temporary_beside(path)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def home_expanded(text: str, what: str) -> Path:
    """A path with `~` and `~user` replaced. Raises UserError, which begins with `what`, where nobody has that home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{what}={text}: there is no such home directory; write the path in full") from None


def remove(path: Path) -> None:
    """Delete what is there under a file's name, a directory included; nothing is fine, too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same directory that nobody else uses.

    What is made under it follows the umask; `tempfile` makes files for their owner alone.
    """
    return path.with_name(f".{path.name}.partial-{_maker(os.getpid())}-{secrets.token_hex(8)}")


def _maker(process: int) -> str:
    """A process, in a file name: where it runs, and its ID there."""
    return f"{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-{process}"


def _sweep(path: Path) -> None:
    """Remove what a kill left of earlier writes of this file. What a process that lives is writing stays; of processes
    on other machines, what is older than a day goes."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        maker = leftover.name.rpartition("-")[0]
        number = maker.rpartition("-")[2]
        with contextlib.suppress(OSError):
            if number.isdigit() and maker.endswith(f"partial-{_maker(int(number))}"):
                stays = _lives(int(number))
            else:
                stays = time.time() - leftover.stat().st_mtime < SWEPT_AFTER
            if not stays:
                leftover.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def write_json(path: str | Path, obj: Any, mode: int = 0o666) -> None:
    """Write `obj` as indented JSON, atomically, as `write_text`. Dicts get a `schema_version` when they have none."""
    if isinstance(obj, dict) and "schema_version" not in obj:
        obj = {"schema_version": SCHEMA_VERSION, **obj}
    write_text(path, json.dumps(obj, indent=2, allow_nan=True) + "\n", mode)


@contextlib.contextmanager
def open_file(path: str | Path, mode: str = "r") -> Iterator[IO[Any]]:
    """Open an input as `open` does, text as UTF-8. Raises OSError for a pipe or a device, which would be waited for
    without an end."""
    encoding = None if "b" in mode else "utf-8"
    with open(path, mode, encoding=encoding, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
        yield file


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises UserError that names the file when it is missing, is not JSON, or is nested too deeply."""
    path = Path(path)
    try:
        with open_file(path) as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except RecursionError:
        raise UserError(f"{path}: is nested more than {MAX_NESTING} levels deep") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if nested_too_deeply(content):
        raise UserError(f"{path}: is nested more than {MAX_NESTING} levels deep")
    return content


def nested_too_deeply(content: Any) -> bool:
    """Whether lists and mappings lie in each other more than MAX_NESTING times."""
    level = [content]
    for _ in range(MAX_NESTING + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return True


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises UserError as `read_json`, and when it holds anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {describe_json(content)}, not a JSON object")
    return content


def measured_seconds(record: dict[str, Any]) -> float | None:
    """`measured.seconds` of a result or status; None where it has none that could be meant."""
    measured = record.get("measured")
    seconds = measured.get("seconds") if isinstance(measured, dict) else None
    plain = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < 1e12
    return float(seconds) if plain else None


def write_checked(path: str | Path, obj: dict[str, Any]) -> None:
    """`write_json`, with the SHA-256 of the file beside it (NAME.sha256), by which `read_written` knows it."""
    path = Path(path)
    if "schema_version" not in obj:
        obj = {"schema_version": SCHEMA_VERSION, **obj}
    text = json.dumps(obj, indent=2, allow_nan=True) + "\n"
    # First, so that a kill in between leaves no file that seems to have been changed.
    remove(path)
    remove(_hash_beside(path))
    write_text(_hash_beside(path), hashlib.sha256(text.encode()).hexdigest() + "\n")
    write_text(path, text)


def read_written(path: str | Path) -> dict[str, Any]:
    """What `write_checked` wrote. A file without a hash beside it is taken as it is: older versions wrote none.

    Raises:
        UserError: as `read_json_object`, or the file was changed since it was written.
    """
    path = Path(path)
    content = read_json_object(path)
    try:
        expected = _hash_beside(path).read_text().strip()
    except FileNotFoundError:
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{_hash_beside(path)}: cannot be read ({error})") from None
    if hash_file(path) != expected:
        raise UserError(f"{path}: is not what was written (SHA-256)")
    return content


def _hash_beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def describe_json(value: Any) -> str:
    """What a JSON value is, in words: "a list", "null"."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {list: "a list", dict: "an object", str: "a text"}.get(type(value), "a number")


def canonical_json(obj: Any) -> str:
    """One spelling per value: sorted keys, no spaces. The input of every hash in a run directory."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"))


def hash_json(obj: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `obj`."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in 1 MiB pieces. Raises UserError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_file(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()
