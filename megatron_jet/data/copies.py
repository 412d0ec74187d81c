"""How many documents of a corpus say what another one says, in bounded memory."""

LIMIT = 1 << 18  # contents remembered, some 40 MiB


class Copies:
    """Counts copies among contents that come one after the other.

    Up to LIMIT different contents the count is exact. Beyond that only those are remembered whose hash ends with a
    number of zero bits that grows with the corpus: a sample of contents, of which every copy is seen.

    Attributes:
        first: name of the first copy; None as long as there is none.
    """

    def __init__(self):
        self.first: str | None = None
        self._level = 0  # zero bits
        self._seen: dict[int, int] = {}  # hash -> copies

    def add(self, digest: str, name: str) -> None:
        """Note a document.

        Args:
            digest: of its content, hex.
            name: of the document.
        """
        value = int(digest[:16], 16)
        if value % (1 << self._level):
            return
        if value in self._seen:
            self._seen[value] += 1
            self.first = self.first or name
            return
        self._seen[value] = 0
        while len(self._seen) > LIMIT:
            self._level += 1
            self._seen = {value: copies for value, copies in self._seen.items() if not value % (1 << self._level)}

    @property
    def count(self) -> int:
        """Documents that are copies of an earlier one; an estimate when contents were left out."""
        return sum(self._seen.values()) << self._level

    def __str__(self) -> str:
        return f"about {self.count:,}" if self._level else f"{self.count:,}"
