"""Which errors are a matter of what was asked for, and which of what happened then."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_jet.configs.errors import UserError


class UsageError(UserError):
    """What was asked for cannot be done, whoever asks again: an unknown name, a bad value. Nothing has been started.

    Commands print it and exit 2; other UserErrors exit 1.
    """


@contextmanager
def usage_errors() -> Iterator[None]:
    """Around, or as decorator of, what reads and checks a command line: its UserErrors become UsageErrors."""
    try:
        yield
    except UserError as error:
        if type(error) is not UserError:
            raise  # a silent Slurm, or Ctrl-C
        raise UsageError(*error.args) from None
