"""The container GGUF: what a file of llama.cpp says of itself, and where its tensors are.

    "GGUF" | u32 version | u64 tensors | u64 keys
    each key       text name, u32 type, value           a text is a u64 length and UTF-8
    each tensor    text name, u32 n, n times u64 size (the row length first), u32 type, u64 offset
    the data       at the next multiple of general.alignment; each offset is one too

Versions 2 and 3 are the same for little-endian files. Opening reads the header only. Everything in
the header is compared with the size of the file before memory is allocated for it.
"""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fgrlhf.data.fields import UserError, show
from fgrlhf.layouts.ggml import KINDS, OTHERS, Kind
from fgrlhf.layouts.kinds import check_kind
from fgrlhf.layouts.stored import damaged, in_a_line

A_GGUF_FILE = "a GGUF file of llama.cpp"
LONGEST = 64 << 20                          # bytes of a header; that of Llama 3 has 8 million
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
           10: "<u8", 11: "<i8", 12: "<f8"}
TEXT, ARRAY = 8, 9


class Entry(NamedTuple):
    """A tensor: its type, its shape with the row length last, and its bytes in the file."""

    kind: Kind
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFFile(NamedTuple):
    """The metadata and the tensors of a file by name."""

    path: Path
    metadata: dict[str, object]             # texts, numbers, lists of text, arrays of numbers
    tensors: dict[str, Entry]


def open_gguf(path: Path) -> GGUFFile:
    """Reads the header of a file, and checks the place of every tensor.

    A float32 in the metadata becomes the shortest decimal number that rounds to it (1e-05).
    Raises UserError, with the file and the key or the tensor, for everything that contradicts
    itself or the size of the file, and for types of numbers that are not read here.
    """
    start = check_kind(path, A_GGUF_FILE)
    if start[:4] != b"GGUF" or len(start) < 24:
        raise damaged(path, f"expected {A_GGUF_FILE} of at least 24 bytes, got something else")
    version, count, keys = struct.unpack("<IQQ", start[4:24])
    if version not in (2, 3):
        got = "a big-endian file" if version in (2 << 24, 3 << 24) else f"version {version}"
        raise UserError(f"{path}: expected GGUF version 2 or 3, little-endian, got {got}, which is "
                        "not supported; convert the model again")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(path, data, 24)
        metadata = header.metadata(keys)
        tensors = header.tensors(count, _alignment(path, metadata))
    return GGUFFile(path, metadata, tensors)


def _alignment(path: Path, metadata: dict[str, object]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise damaged(path, "general.alignment: expected a power of 2 from 8 to 2**20, got "
                            f"{show(alignment)}")
    return alignment


class _Header:
    """Reads values one after the other, and never beyond the end of the file or LONGEST."""

    def __init__(self, path: Path, data: mmap.mmap, at: int):
        self.path, self.data, self.at = path, data, at
        self.end = min(len(data), LONGEST)

    def skip(self, size: int, place: str) -> int:
        """Moves `size` bytes on. Returns the offset of the first of them."""
        if size > self.end - self.at:
            if self.end < len(self.data):
                raise damaged(self.path, f"{place}: expected a header of at most {LONGEST} bytes, "
                                         "got more")
            raise damaged(self.path, f"{place}: expected {size} more bytes, got "
                                     f"{self.end - self.at}: truncated")
        self.at += size
        return self.at - size

    def number(self, kind: int, place: str):
        code = np.dtype(NUMBERS[kind])
        value = np.frombuffer(self.data[(at := self.skip(code.itemsize, place)):
                                        at + code.itemsize], code)[0]
        return float(str(value)) if kind == 6 else value.item()

    def text(self, place: str) -> str:
        return self.texts(1, place)[0]

    def texts(self, count: int, place: str) -> list[str]:
        """Reads texts in one loop, because a tokenizer has a few hundred thousand."""
        found, at, unpack = [], self.at, struct.Struct("<Q").unpack_from
        self._has_room(count, 8, place)
        try:
            for _ in range(count):
                size, = unpack(self.data, at)
                at += 8 + size
                if at > self.end:
                    break
                found.append(self.data[at - size:at].decode())
        except UnicodeDecodeError:
            raise damaged(self.path, f"{place}: expected UTF-8, got other bytes") from None
        except struct.error:                                # the file ends inside a length
            at = self.end + 1
        self.skip(at - self.at, place)
        return found

    def u32(self, place: str) -> int:
        return struct.unpack("<I", self.data[(at := self.skip(4, place)):at + 4])[0]

    def u64(self, place: str, count: int = 1) -> tuple[int, ...]:
        return struct.unpack(f"<{count}Q", self.data[(at := self.skip(8 * count, place)):self.at])

    def value(self, place: str):
        if (kind := self.u32(place)) == TEXT:
            return self.text(place)
        if kind in NUMBERS:
            return self.number(kind, place)
        if kind == ARRAY:
            kind, (count,) = self.u32(place), self.u64(place)
            if kind == TEXT:
                return self.texts(count, place)
            if kind in NUMBERS:
                code = np.dtype(NUMBERS[kind])
                at = self.skip(count * code.itemsize, place)
                return np.frombuffer(self.data[at:self.at], code)
        raise damaged(self.path, f"{place}: expected a number, a text or an array of these, got "
                                 f"type {kind}")

    def _has_room(self, count: int, size: int, place: str) -> None:
        """Raises UserError when `count` things of at least `size` bytes cannot follow."""
        if count * size > len(self.data) - self.at:
            raise damaged(self.path, f"{place}: expected {count} entries, got a file that has no "
                                     "room for them: truncated")

    def metadata(self, count: int) -> dict[str, object]:
        self._has_room(count, 13, "metadata")
        found = {}
        for number in range(count):
            key = self.text(f"key {number}")
            if key in found:
                raise damaged(self.path, f"{in_a_line(key)}: expected this key once, got it twice")
            found[key] = self.value(in_a_line(key))
        return found

    def tensors(self, count: int, alignment: int) -> dict[str, Entry]:
        """Reads the table of tensors. The data of each follows the one before it, aligned."""
        self._has_room(count, 32, "tensors")
        found = {}                                          # name: (kind, shape, offset)
        for number in range(count):
            name = self.text(f"tensor {number}")
            place = f"tensor {in_a_line(name)}"
            if name in found:
                raise damaged(self.path, f"{place}: expected it once, got it twice")
            if not 1 <= (dimensions := self.u32(place)) <= 4:
                raise damaged(self.path, f"{place}: expected 1 to 4 dimensions, got {dimensions}")
            shape = self.u64(place, dimensions)[::-1]
            found[name] = (self._kind(place, shape), shape, self.u64(place)[0])
        return self._place(found, alignment)

    def _kind(self, place: str, shape: tuple[int, ...]) -> Kind:
        if (number := self.u32(place)) not in KINDS:
            raise UserError(
                f"{self.path}: {place}: expected one of {', '.join(k.name for k in KINDS.values())}"
                f", got {OTHERS.get(number, f'type {number}')}, which is not read here; choose a "
                "file with another quantisation")
        kind = KINDS[number]
        if min(shape) < 1 or shape[-1] % kind.count:
            raise damaged(self.path, f"{place}: expected rows of a multiple of {kind.count} "
                                     f"numbers for {kind.name}, got {shape}")
        return kind

    def _place(self, found: dict, alignment: int) -> dict[str, Entry]:
        """Checks that the tensors follow each other without an overlap or a gap."""
        data, size, entries = -(-self.at // alignment) * alignment, len(self.data), {}
        expected = 0
        for name, (kind, shape, offset) in sorted(found.items(), key=lambda item: item[1][2]):
            place, length = f"tensor {in_a_line(name)}", prod(shape) // kind.count * kind.size
            if offset != expected:
                fault = ("misaligned" if offset % alignment else
                         "an overlap" if offset < expected else "a gap")
                raise damaged(self.path, f"{place}: expected its start at byte {expected} of the "
                                         f"data, got {offset}: {fault}")
            if data + offset + length > size:
                raise damaged(self.path, f"{place}: expected {data + offset + length} bytes, got a "
                                         f"file of {size}: truncated")
            entries[name] = Entry(kind, shape, data + offset, length)
            expected = -(-(offset + length) // alignment) * alignment
        return {name: entries[name] for name in found}
