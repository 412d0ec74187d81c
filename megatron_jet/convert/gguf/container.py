"""The GGUF file format: fields, and tensors that are read and dequantised one at a time. numpy and torch only.

Layout (ggml's docs/gguf.md): magic, version, number of tensors and of fields; the fields, each a name, a type and a
value; per tensor its name, dimensions (fastest first), type and place; then the data, aligned. Little-endian.
Quantised types hold blocks of 32 weights: Q8_0 a scale and 32 int8; Q4_0 a scale and 32 four-bit values less 8;
Q4_1 a scale, a minimum and 32 four-bit values; the low halves of the bytes come before the high ones.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_jet.configs.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
BLOCK = 32  # weights
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Number -> name, bytes of a block, weights in it.
TYPES = {0: ("F32", 4, 1), 1: ("F16", 2, 1), 30: ("BF16", 2, 1)} | {
    2: ("Q4_0", 18, BLOCK),
    3: ("Q4_1", 20, BLOCK),
    8: ("Q8_0", 34, BLOCK),
}
# Names of types that are not read, so that the message can say which one a file has.
OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}
QUANTISED = ("Q4_0", "Q4_1", "Q8_0")
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_DIMENSIONS = 4
ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: shape (slowest first), type, and where its bytes are."""

    shape: tuple[int, ...]
    kind: str
    start: int
    bytes: int


class GgufFile:
    """A GGUF file, of which only the part before the data has been read.

    Attributes:
        path: the file.
        fields: values by name.
        tensors: entries by name.

    Raises:
        UserError: no GGUF, an unknown version, a damaged or truncated file, a tensor type that is not read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise UserError(f"{self.path}: not a GGUF file")
            self._data = np.memmap(self.path, np.uint8, "r")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        try:
            self.fields, self.tensors = self._read_head(_Cursor(memoryview(self._data), len(MAGIC)))
        except (struct.error, ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"{self.path}: damaged or truncated GGUF ({error}); download or copy it again") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    @property
    def quantised(self) -> bool:
        """Whether any tensor is stored in blocks of few bits."""
        return any(entry.kind in QUANTISED for entry in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """One tensor in its own type; quantised ones in fp32."""
        entry = self.tensors[name]
        data = np.asarray(self._data[entry.start : entry.start + entry.bytes])
        if entry.kind in FLOATS:
            return torch.from_numpy(data.copy()).view(FLOATS[entry.kind]).view(entry.shape)
        return torch.from_numpy(_dequantise(entry.kind, data)).view(entry.shape)

    def _read_head(self, cursor: "_Cursor") -> tuple[dict[str, Any], dict[str, Entry]]:
        version = cursor.scalar("I")
        if version not in VERSIONS:
            raise UserError(f"{self.path}: GGUF version {version}; {' and '.join(map(str, VERSIONS))} are read")
        num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = cursor.string()
            if name in fields:
                raise ValueError(f"field {name!r} is there twice")
            fields[name] = cursor.value(cursor.scalar("I"))
        heads = [self._tensor_head(cursor) for _ in range(num_tensors)]
        alignment = fields.get(ALIGNMENT, BLOCK)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{ALIGNMENT} is {alignment!r}")
        base = -(-cursor.place // alignment) * alignment
        return fields, self._placed(heads, base)

    def _tensor_head(self, cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = cursor.string(), cursor.scalar("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        return name, shape, cursor.scalar("I"), cursor.scalar("Q")

    def _placed(self, heads: list[tuple[str, tuple[int, ...], int, int]], base: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for name, shape, number, offset in heads:
            if number not in TYPES:
                kind = OTHER_TYPES.get(number, f"number {number}")
                read = ", ".join(known for known, _, _ in TYPES.values())
                raise UserError(f"{self.path}: tensor '{name}' has type {kind}; only {read} are read")
            kind, size, weights = TYPES[number]
            count = math.prod(shape)
            if shape[-1] % weights or name in entries:
                raise ValueError(f"tensor {name!r} is there twice, or its rows are no whole blocks")
            entry = Entry(shape, kind, base + offset, count // weights * size)
            if entry.start + entry.bytes > len(self._data):
                raise ValueError(f"tensor {name!r} ends beyond the file")
            entries[name] = entry
        return entries


class _Cursor:
    """Reads one value after the other. A string or an array can be no longer than what is left of the file."""

    def __init__(self, data: memoryview, place: int):
        self.data, self.place = data, place

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.place)
        self.place += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self._length()
        text = bytes(self.data[self.place : self.place + length]).decode()
        self.place += length
        return text

    def value(self, kind: int) -> Any:
        """A field's value: a number, a text, or a list of either."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            of, length = self.scalar("I"), self._length()
            if of in SCALARS:  # at once: a vocabulary's scores are a hundred thousand numbers
                code = f"<{length}{SCALARS[of]}"
                values = struct.unpack_from(code, self.data, self.place)
                self.place += struct.calcsize(code)
                return list(values)
            return [self.value(of) for _ in range(length)]
        if kind not in SCALARS:
            raise ValueError(f"a field has the unknown type {kind}")
        return self.scalar(SCALARS[kind])

    def _length(self) -> int:
        length = self.scalar("Q")
        if length > len(self.data) - self.place:
            raise ValueError(f"a text or list of {length} items is longer than the file")
        return length


def _dequantise(kind: str, data: np.ndarray) -> np.ndarray:
    """fp32 weights of the blocks in `data`."""
    size = next(size for name, size, _ in TYPES.values() if name == kind)
    blocks = data.reshape(-1, size)
    scale = _half(blocks, 0)
    if kind == "Q8_0":
        return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    start = 2 if kind == "Q4_0" else 4
    values = np.concatenate([blocks[:, start:] & 15, blocks[:, start:] >> 4], axis=1).astype(np.float32)
    return scale * (values - 8) if kind == "Q4_0" else scale * values + _half(blocks, 2)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The fp16 number at a place of every block, in fp32 [blocks, 1]."""
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)
