"""The error types that users see."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the fix; commands print it, exit with `exit_code`."""

    exit_code = 1

    def __str__(self) -> str:
        # Paths and other programs' words may have line breaks in them.
        return " ".join(super().__str__().splitlines())


class UsageError(UserError):
    """What was asked for cannot be done, whoever asks again: an unknown name, a bad value. Nothing has been started."""

    exit_code = 2


@contextmanager
def usage_errors() -> Iterator[None]:
    """Around, or as decorator of, what reads and checks a command line: its UserErrors become UsageErrors."""
    try:
        yield
    except UserError as error:
        if type(error) is not UserError:
            raise  # a silent Slurm, or Ctrl-C
        raise UsageError(*error.args) from None
