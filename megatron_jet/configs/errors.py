"""The one error type that users see."""


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the fix; commands print it and exit 1,
    or 2 where it is about what was asked for (jet_launcher/usage.py)."""

    def __str__(self) -> str:
        # Paths and other programs' words may have line breaks in them.
        return " ".join(super().__str__().splitlines())
