"""Read and write safetensors files: an 8-byte length, a JSON header, raw little-endian tensors.

    u64 n | header: n bytes of JSON | data
    header = {"__metadata__": {text: text},
              name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [start, end]}, ...}

The format cannot hold code, and reading maps the file: a tensor costs memory when it is touched.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from fgrlhf.config import UserError
from fgrlhf.fields import show
from fgrlhf.files import write_atomic

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafeTensors(Mapping[str, Tensor]):
    """The tensors of one file by name, each a view of the mapped file.

    Everything is validated on opening: the header's length and JSON, dtypes, shapes, sizes, and
    that the tensors cover the data exactly, without an overlap or a hole. Raises UserError naming
    the file and the tensor. (Do not cut a file short while it is open: the system kills readers.)
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        size = self.path.stat().st_size
        header, start = _read_header(self.path, size)
        self.metadata = header.pop("__metadata__", {})
        self._entries = {name: _check_entry(self.path, name, entry, size - start)
                         for name, entry in header.items()}
        _check_cover(self.path, self._entries, size - start)
        mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
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
    """The header and the offset of the data."""
    with open(path, "rb") as file:
        if size < 8:
            raise UserError(f"{path}: not a safetensors file: expected at least 8 bytes, "
                            f"got {size}")
        length, = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise UserError(f"{path}: the header is said to be {length} bytes long and the file "
                            f"has {size}; it is truncated or not a safetensors file")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: header: expected a JSON object, got {type(header).__name__}")
    return header, 8 + length


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _check_entry(path: Path, name: str, entry: object, size: int):
    """A header entry as (dtype, shape, (start, end)), with `size` bytes of data in the file."""
    def natural(values) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path}: tensor {name}: expected dtype, shape and data_offsets, "
                        f"got {show(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name}: unsupported dtype {dtype!r}; "
                        f"expected one of {', '.join(DTYPES)}")
    if not natural(shape):
        raise UserError(f"{path}: tensor {name}: expected a shape, got {shape}")
    if not natural(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise UserError(f"{path}: tensor {name}: expected data_offsets [start, end], got {offsets}")
    if offsets[1] > size:
        raise UserError(f"{path}: tensor {name}: ends at byte {offsets[1]} of the data, which has "
                        f"{size}; the file is truncated")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise UserError(f"{path}: tensor {name}: {dtype} {shape} takes {expected} bytes, "
                        f"data_offsets give {offsets[1] - offsets[0]}")
    return DTYPES[dtype], tuple(shape), tuple(offsets)


def _check_cover(path: Path, entries: dict, size: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    covered = 0
    for name, (_, _, (start, end)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if start != covered:
            raise UserError(f"{path}: tensor {name}: starts at byte {start} of the data, expected "
                            f"{covered}: {'it overlaps another' if start < covered else 'a hole'}")
        covered = end
    if covered != size:
        raise UserError(f"{path}: the tensors end at byte {covered} of the data, which has {size}")


class Planned(NamedTuple):
    """A tensor to be written: what the header says, and how to make it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_safetensors(path: str | Path, tensors: Mapping[str, Planned]) -> None:
    """Write atomically, making one tensor at a time, in order."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0      # transformers insists on the "pt"
    for name, (dtype, shape, _) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                             # the data starts aligned

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape, make) in tensors.items():
            tensor = make().detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), name
            file.write(tensor.view(-1).view(torch.uint8).numpy())

    write_atomic(path, write)
