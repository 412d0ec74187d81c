"""The one form that shards have, and the only thing that is decoded: whatever else a tar file could hold is refused.

Shards may come from anywhere. webdataset's own reader chooses a decoder by the end of a member's name, and some of
those run code (pickles); it runs paths that begin with `pipe:` as commands. So shards are written with webdataset, and
read here: regular members of three names, arrays of three types whose sizes are those of their members.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

BLOCK = 512  # bytes; a tar file is made of these
MAX_MEMBER_BYTES = 1 << 30  # far more than one document's tokens take
_NAME = re.compile(rb"(\d{9,12})\.(json|mask\.npy|tokens\.npy)")
_SIZE = re.compile(rb"[0-7]{11}[\0 ]")
_ARRAY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '(<u2|<u4|\|u1)', 'fortran_order': False, 'shape': \((\d{1,12}),\), \} *\n",
    re.DOTALL,
)
_TYPES = {b"<u2": np.dtype("<u2"), b"<u4": np.dtype("<u4"), b"|u1": np.dtype("|u1")}


class FormatError(ValueError):
    """A shard that this project did not write so."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One document or task sample.

    Attributes:
        tokens: [t] uint16 or uint32.
        mask: [t] uint8, one where the token counts as a target; None: everywhere.
    """

    tokens: np.ndarray
    mask: np.ndarray | None = None


def read_samples(file: BinaryIO) -> Iterator[Sample]:
    """The samples of a shard, in order.

    Raises:
        FormatError: says what of the file is not as it is written here.
    """
    number, parts = 0, {}
    for key, kind, content in _members(file):
        if key != number:
            if key != number + 1 or "tokens.npy" not in parts:
                raise FormatError(f"sample {key} follows an incomplete sample or one that is not the one before it")
            yield _sample(number, parts)
            number, parts = key, {}
        if kind in parts:
            raise FormatError(f"sample {number} has {kind} twice")
        parts[kind] = content
    if parts:
        yield _sample(number, parts)


def _sample(number: int, parts: dict[str, bytes]) -> Sample:
    if "tokens.npy" not in parts:
        raise FormatError(f"sample {number} has no tokens.npy")
    tokens = _array(parts["tokens.npy"], f"tokens of sample {number}")
    if tokens.dtype.itemsize < 2 or not len(tokens):
        raise FormatError(f"tokens of sample {number}: {len(tokens)} of type {tokens.dtype}")
    if "mask.npy" not in parts:
        return Sample(tokens)
    mask = _array(parts["mask.npy"], f"mask of sample {number}")
    if mask.dtype.itemsize != 1 or len(mask) != len(tokens) or mask.max() > 1:
        raise FormatError(f"mask of sample {number} is not a 0 or 1 for each of {len(tokens)} tokens")
    return Sample(tokens, mask)


def _array(content: bytes, what: str) -> np.ndarray:
    """A row of numbers in numpy's own format. Its header is compared with the one form, not evaluated."""
    header = _ARRAY.match(content)
    if header is None or int.from_bytes(header[1], "little") != header.end() - 10:
        raise FormatError(f"{what}: not a row of unsigned whole numbers")
    dtype, count = _TYPES[header[2]], int(header[3])
    if count * dtype.itemsize != len(content) - header.end():
        raise FormatError(f"{what}: {count:,} numbers in {len(content) - header.end():,} bytes")
    return np.frombuffer(content, dtype, count, header.end())


def _members(file: BinaryIO) -> Iterator[tuple[int, str, bytes]]:
    """Number of the sample, kind and content of every member."""
    while True:
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise FormatError("it is cut short")
        if not any(header):
            return
        name = header[:100].rstrip(b"\0")
        known = _NAME.fullmatch(name)
        shown = name.decode("utf-8", "backslashreplace")[:100]
        if known is None or any(header[345:500]):  # the beginning of a longer name
            raise FormatError(f"member {shown!r} is nothing that tools/prepare_data.py writes")
        if header[156:157] not in (b"0", b"\0"):
            raise FormatError(f"member {shown!r} is a link or a device, not a file")
        field = header[124:136]
        size = int(field[:11], 8) if _SIZE.fullmatch(field) else MAX_MEMBER_BYTES + 1
        if size > MAX_MEMBER_BYTES:
            raise FormatError(f"member {shown!r} says that it is larger than {MAX_MEMBER_BYTES >> 30} GiB")
        content = file.read(size)
        if len(content) < size or len(file.read(-size % BLOCK)) < -size % BLOCK:
            raise FormatError("it is cut short")
        yield int(known[1]), known[2].decode(), content
