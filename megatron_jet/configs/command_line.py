"""What every script in tools/ shares: argument types that fail before the work starts, and errors in one line."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_jet.configs.errors import UserError

DONE, FAILED, INTERRUPTED = 0, 1, 75


def run_tool(main: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Call a script's main. What a user can repair is one line on stderr, not a traceback.

    Args:
        main: the script's work.
        interrupted: what to say after Ctrl-C.

    Returns:
        Its exit code; 1 after an error, 75 after Ctrl-C.
    """
    try:
        return main()
    except UserError as error:
        message, code = str(error), FAILED
    except BrokenPipeError:  # `| head`; Python would complain once more when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, code = f"{where}{error.strerror or error}", FAILED
    except KeyboardInterrupt:
        message, code = interrupted, INTERRUPTED
    print(f"error: {message}", file=sys.stderr)
    return code


def positive(text: str) -> int:
    """argparse type: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
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
