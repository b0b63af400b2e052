"""The bytes of a GGUF file: its metadata, and its tensors one at a time, dequantised.

The layout is that of ggml's ``docs/gguf.md``, versions 2 and 3, little-endian: a header, key-value pairs, a table of
tensors, then their data, aligned. Blocks are dequantised by the ``gguf`` package. Its own reader makes an array of
every string, 1.6 s of CPU time for SmolLM2's vocabulary, where these lines pass over them.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from ..errors import KangarooError

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The numbers' type codes, in ``struct``'s letters."""
STRING, ARRAY = 8, 9
ROWS_AT_ONCE = 256
"""How many rows are dequantised at a time: the package takes several times their size beside the result."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in the file.

    Attributes:
        kind: how its values are stored.
        shape: in PyTorch's order.
        start: its first byte in the file.
        nbytes: its size in the file.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file, mapped into memory.

    Attributes:
        path: the file.
        metadata: every number, string and list of numbers by its key; None in the place of other lists.
        tensors: the table of its tensors.

    Raises:
        KangarooError: a file that is damaged, truncated, or no GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # a ValueError where it is empty
            raise KangarooError(f"{path} cannot be read ({error}).") from error
        if self.bytes[:4].tobytes() != MAGIC:
            raise KangarooError(f"{path} is not a GGUF file.")
        self._header, self._at = self.bytes.data, len(MAGIC)
        try:
            self._check_version()
            tensors, pairs = self._numbers("2Q")
            self.metadata = dict(self._pair() for _ in range(pairs))
            table = [self._entry() for _ in range(tensors)]
        except (struct.error, UnicodeDecodeError, KeyError, RecursionError) as error:
            raise KangarooError(f"{path} is truncated or damaged (at byte {self._at}).") from error
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise KangarooError(f"{path}: general.alignment is {alignment!r}; it must be a whole number of at least 1.")
        data = -(-self._at // alignment) * alignment
        self.tensors = {entry[0]: self._placed(data, *entry) for entry in table}

    def read(self, name: str) -> Tensor:
        """A copy of a tensor: in the dtype that it is stored in, or dequantised to float32.

        Raises:
            KangarooError: a kind of block that the ``gguf`` package cannot dequantise.
        """
        stored = self.tensors[name]
        data = self.bytes[stored.start : stored.start + stored.nbytes]
        if stored.kind in VALUES:
            return torch.from_numpy(np.array(data)).view(VALUES[stored.kind]).view(stored.shape)
        columns = stored.shape[-1]
        rows = data.reshape(stored.nbytes // row_bytes(stored.kind, columns), -1)
        values = np.empty((len(rows), columns), np.float32)
        try:
            for first in range(0, len(rows), ROWS_AT_ONCE):
                values[first : first + ROWS_AT_ONCE] = dequantize(rows[first : first + ROWS_AT_ONCE], stored.kind)
        except NotImplementedError as error:
            raise KangarooError(
                f"{self.path}: tensor {name!r} is stored as {stored.kind.name}, which cannot be dequantised."
            ) from error
        return torch.from_numpy(values).view(stored.shape)

    # ---- the header, from front to back

    def _numbers(self, letters: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + letters, self._header, self._at)
        self._at += struct.calcsize("<" + letters)
        return values

    def _check_version(self) -> None:
        (version,) = self._numbers("I")
        if version not in VERSIONS:
            kind = "big-endian" if version >= 1 << 16 else f"of version {version}"
            raise KangarooError(f"{self.path} is {kind}; GGUF files of versions 2 and 3, little-endian, are read.")

    def _string(self) -> str:
        (size,) = self._numbers("Q")
        text = self._skip(size)
        return text.tobytes().decode("utf-8")

    def _skip(self, size: int) -> memoryview:
        if size > len(self._header) - self._at:
            raise struct.error("beyond the end")
        self._at += size
        return self._header[self._at - size : self._at]

    def _pair(self) -> tuple[str, Any]:
        key = self._string()
        return key, self._value(*self._numbers("I"))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._numbers(NUMBERS[kind])[0]
        inner, count = self._numbers("IQ")
        if inner in NUMBERS:
            data = self._skip(count * struct.calcsize("<" + NUMBERS[inner]))
            return [number for (number,) in struct.iter_unpack("<" + NUMBERS[inner], data)]
        if inner not in (STRING, ARRAY):
            raise KeyError(inner)
        for _ in range(count):
            if inner == STRING:
                self._skip(*self._numbers("Q"))
            else:
                self._value(ARRAY)
        return None

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._numbers("I")
        shape = tuple(reversed(self._numbers(f"{dimensions}Q")))  # the file's first dimension is the innermost
        return (name, shape, *self._numbers("IQ"))

    def _placed(self, data: int, name: str, shape: tuple[int, ...], code: int, offset: int) -> StoredTensor:
        try:
            kind = GGMLQuantizationType(code)
            size = math.prod(shape[:-1]) * row_bytes(kind, shape[-1])
            if size < 1:
                raise ValueError("a dimension is 0")
        except (ValueError, IndexError) as error:
            raise KangarooError(f"{self.path}: tensor {name!r} has a shape or a type that is unknown here.") from error
        if data + offset + size > len(self.bytes):
            raise KangarooError(
                f"{self.path} is truncated: {name!r} ends at byte {data + offset + size:,} of {len(self.bytes):,}."
            )
        return StoredTensor(kind, shape, data + offset, size)


VALUES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F64: torch.float64,
}
"""What is stored as values, instead of blocks."""


def row_bytes(kind: GGMLQuantizationType, columns: int) -> int:
    """Bytes of a row of ``columns`` values.

    Raises:
        ValueError: columns that do not fill the blocks.
    """
    block, size = GGML_QUANT_SIZES[kind]
    if columns < 1 or columns % block:
        raise ValueError(f"{columns} columns are not a multiple of {block}")
    return columns // block * size
