"""safetensors files, read and written: a length, a JSON header, raw little-endian tensors.

    u64 n | header: n bytes of JSON | data
    header = {"__metadata__": {text: text},
              name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [start, end]}, ...}

The format cannot hold code. The file is memory-mapped: a tensor takes memory only when it is used.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from fgrlhf.data.fields import UserError, show
from fgrlhf.data.files import write_atomic
from fgrlhf.layouts.kinds import check_kind
from fgrlhf.layouts.stored import LONGEST, damaged, in_a_line

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafeTensors(Mapping[str, Tensor]):
    """The tensors of one file by name, each a view of the mapped file.

    Opening checks everything: the length and JSON of the header, dtypes, shapes, sizes, and that
    the tensors cover the data exactly, without an overlap or a gap. Raises UserError with the file
    and the tensor. (Do not truncate a file while it is open: the system kills the reading program.)
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        check_kind(path, "a safetensors file")
        size = path.stat().st_size
        header, start = _read_header(path, size)
        self._entries = {name: _check_entry(path, name, entry, size - start)
                         for name, entry in header.items() if name != "__metadata__"}
        _check_cover(path, self._entries, size - start)
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        self._data = mapped[start:]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, (start, end) = self._entries[name]
        data = self._data[start:end]
        if data.storage_offset() % dtype.itemsize:              # old writers did not align
            data = data.clone()
        return data.view(dtype).view(shape)


def _read_header(path: Path, size: int) -> tuple[dict, int]:
    """Returns the header and the offset of the data."""
    with open(path, "rb") as file:
        if size < 8:
            raise damaged(path, f"expected a safetensors file of at least 8 bytes, got {size}")
        length, = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise damaged(path, f"expected a header of {length} bytes, got a file of {size}: it is "
                                "truncated, or not a safetensors file")
        if length > LONGEST:
            raise damaged(path, f"expected a header of at most {LONGEST} bytes, got {length}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise damaged(path, f"header: expected JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged(path, f"header: expected a JSON object, got {type(header).__name__}")
    return header, 8 + length


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _check_entry(path: Path, name: str, entry: object, size: int):
    """Returns an entry of the header as (dtype, shape, (start, end)), or raises UserError.

    size: the number of bytes of data in the file.
    """
    def natural(values) -> bool:
        return isinstance(values, list) and len(values) < 9 and all(
            type(v) is int and 0 <= v < 2**63 for v in values)

    place = f"{path}: tensor {in_a_line(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(place, f"expected dtype, shape and data_offsets, got {show(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{place}: dtype: expected one of {', '.join(DTYPES)}, got {show(dtype)}; "
                        "choose a checkpoint in one of these")
    if not natural(shape):
        raise damaged(place, f"expected a shape, got {show(shape)}")
    if not natural(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise damaged(place, f"expected data_offsets [start, end], got {show(offsets)}")
    if offsets[1] > size:
        raise damaged(place, f"expected {offsets[1]} bytes of data, got {size}: truncated")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise damaged(place, f"expected {expected} bytes for {dtype} {shape}, got "
                             f"{offsets[1] - offsets[0]}")
    return DTYPES[dtype], tuple(shape), tuple(offsets)


def _check_cover(path: Path, entries: dict, size: int) -> None:
    """Raises UserError unless every byte of the data belongs to exactly one tensor."""
    covered = 0
    for name, (_, _, (start, end)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if start != covered:
            fault = "an overlap" if start < covered else "a gap"
            raise damaged(path, f"tensor {in_a_line(name)}: expected its start at byte {covered} "
                                f"of the data, got {start}: {fault}")
        covered = end
    if covered != size:
        raise damaged(path, f"expected {covered} bytes of tensors, got {size} bytes of data")


class Planned(NamedTuple):
    """A tensor to be written: the facts for the header, and a function that makes the tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_safetensors(path: str | Path, tensors: Mapping[str, Planned]) -> None:
    """Writes a file atomically. The tensors are made one at a time, in order."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0      # transformers needs the "pt"
    for name, (dtype, shape, _) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                             # the data begins at a multiple of 8

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape, make) in tensors.items():
            tensor = make().detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), name
            file.write(tensor.view(-1).view(torch.uint8).numpy())

    write_atomic(path, write)
