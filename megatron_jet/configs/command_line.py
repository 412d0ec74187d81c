"""What every script in tools/ shares: argument types that fail before the work starts, and errors in one line."""

import argparse
import contextlib
import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import os_error_line
from megatron_jet.configs.signals import Interrupted, restore_signals, stop_on_signals

DONE, FAILED, INTERRUPTED = 0, 1, 75


def run_tool(main: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Call a program's main. What a user can repair is one line on stderr, not a traceback.

    Args:
        main: the script's work.
        interrupted: what to say after Ctrl-C.

    Returns:
        Its exit code; the error's own (1, or 2 where it is about what was asked for) after an error, 75 after Ctrl-C,
        SIGTERM or SIGHUP.
    """
    before = stop_on_signals()
    try:
        return _run(main, interrupted)
    finally:
        restore_signals(before)


def _run(main: Callable[[], int], interrupted: str) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no error
    try:
        code = main()
        sys.stdout.flush()
        return code
    except UserError as error:
        message, code = str(error), error.exit_code
    except BrokenPipeError:  # `| head`
        _forget_output()
        return FAILED
    except OSError as error:
        message, code = os_error_line(error), FAILED
        if error.filename is None and error.errno == errno.ENOSPC:
            message = f"the output cannot be written ({error.strerror})"
        _forget_output()
    except Interrupted as stopped:
        message, code = str(stopped) or interrupted, INTERRUPTED
    except KeyboardInterrupt:
        message, code = interrupted, INTERRUPTED
    print(f"error: {message}", file=sys.stderr)
    return code


def _forget_output() -> None:
    """Python would complain once more when it flushes a stdout that takes nothing."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def positive(text: str) -> int:
    """argparse type: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def seed(text: str) -> int:
    """argparse type: a whole number of 32 bits, which every generator of random numbers takes."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {2**32 - 1}")
    return value


def lengths(text: str) -> tuple[int, ...]:
    """argparse type: numbers above 0, separated by commas."""
    return tuple(positive(item) for item in text.split(","))


def output_file(text: str) -> str:
    """argparse type: a file that can be written, so that hours of measuring do not end in a wrong path."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory; give a file")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written ({error.strerror or error})") from None
    finally:
        for folder in missing:  # nothing is left of the attempt
            with contextlib.suppress(OSError):
                folder.rmdir()
    return text
