"""One writer per directory: an advisory lock on a file, which ends with the process that holds it."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import describe_os_error

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # Lustre mounted without, NFS without its lock daemon


@dataclass(frozen=True)
class LockHolder:
    """Who works in a directory."""

    pid: int
    host: str
    since: float


@contextlib.contextmanager
def exclusive(path: Path, advice: str = "wait for it to end", directory: Path | None = None) -> Iterator[int]:
    """Hold the lock file `path`; it stays there afterwards, since a name that goes can be locked twice.

    Args:
        advice: what somebody who is refused can do.
        directory: that is locked; None: the one that the file is in.

    Yields:
        The file descriptor that holds the lock. A child that inherits it holds the lock as well.

    Raises:
        UserError: another process holds it (named), or the directory cannot be written (somebody else's).
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(describe_os_error(error, path.parent)) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(path)
            who = f"process {holder.pid} on {holder.host}" if holder else "another process"
            raise UserError(f"{directory or path.parent}: {who} is working in this directory; {advice}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s: this file system has no locks; nobody keeps two programs from working here", path.parent)
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}).encode())
        yield handle
    finally:
        os.close(handle)


def lock_holder(path: Path) -> LockHolder | None:
    """The process that holds the lock now, or None."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path) or LockHolder(0, "unknown", 0.0)
    except OSError:
        return None
    else:
        return None
    finally:
        os.close(handle)


def _read(path: Path) -> LockHolder | None:
    try:
        data = json.loads(path.read_text())
        return LockHolder(int(data["pid"]), str(data["host"]), float(data["since"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
