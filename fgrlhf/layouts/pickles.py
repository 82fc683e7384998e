"""Torch files (.pth, .bin, .pt): tensors by name, or plain values. Nothing in them is executed.

    since torch 1.6    a zip archive: N/data.pkl describes the tensors, N/data/0, ... hold them
    before             five pickles, the fourth of which describes the tensors, and then the numbers

torch.load with weights_only=True executes no code. It still builds whatever else a pickle asks for
(sparse and nested tensors, byte arrays of any size), and it reads the bytes of a compressed member
as if they were numbers. Both are therefore refused before torch.load is called.
"""

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fgrlhf.data.fields import UserError, show
from fgrlhf.engine.config import is_out_of_memory
from fgrlhf.layouts.kinds import check_kind
from fgrlhf.layouts.stored import LONGEST, damaged, in_a_line

# What the pickle of dense tensors by name asks for, as "module name".
DENSE = re.compile(
    r"collections OrderedDict|torch Size|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v[23]|parameter)"
    r"|torch(\.storage)? \w+Storage|torch [a-z]+\d\w*")                 # the last: dtypes
PLAIN = re.compile(DENSE.pattern + "|_codecs encode")       # bytes, in a training state
LEGACY_PICKLES = 5              # magic number, protocol, system, description, keys of the storages


def open_pickle(path: Path) -> Mapping[str, Tensor]:
    """Opens a torch file as dense tensors by name.

    A zip archive is memory-mapped; a file in the older format is read whole. Raises UserError for
    a file that is damaged, compressed, or describes more numbers than it holds.
    """
    zipped = check_kind(path, "a torch file").startswith(b"PK\x03\x04")
    try:
        held = _check_zip(path) if zipped else _check_legacy(path)
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:                          # a damaged pickle can raise anything
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0][:100]
        raise damaged(path, "expected a torch file, got one that cannot be read "
                            f"({type(error).__name__}: {reason})") from None
    _check_tensors(path, tensors, held)
    return tensors


def load_plain(path: Path) -> object:
    """Reads what torch.save wrote, on the CPU: tensors, numbers, texts, dicts and lists.

    Raises UserError for anything else. The memory that is needed is about the size of the file.
    """
    try:
        _check_zip(path, PLAIN)
        value = torch.load(path, map_location="cpu", weights_only=True)
        _check_storages(value, set())
        return value
    except Exception as error:                          # a damaged pickle can raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: expected plain tensors, got a damaged or foreign file "
                        f"({show(str(error))}); copy it again, or remove it") from None


def _check_storages(value: object, seen: set[int]) -> None:
    """Raises ValueError for a tensor that shows more numbers than it has."""
    if id(value) in seen:
        return
    if isinstance(value, Tensor) and value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor shows {value.numel()} numbers and holds fewer")
    if isinstance(value, dict | list | tuple):
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            _check_storages(item, seen)


def _check_zip(path: Path, allowed: re.Pattern = DENSE) -> int:
    """Checks an archive without reading its tensors. Returns the bytes that the tensors have."""
    held = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path}: member {show(member.filename)}: expected stored bytes, "
                                "as torch.save writes them, got compressed ones; unpack the "
                                "archive and pack it again without compression")
            if "/data/" in member.filename:
                held += member.file_size
            if member.filename.endswith("/data.pkl"):
                if member.file_size > LONGEST:
                    raise damaged(path, f"expected a data.pkl of at most {LONGEST} bytes, got "
                                        f"{member.file_size}")
                _check_pickle(path, io.BytesIO(archive.read(member)), allowed)
    return min(held, path.stat().st_size)


def _check_legacy(path: Path) -> int:
    with open(path, "rb") as file:
        start = io.BytesIO(file.read(LONGEST))
    for _ in range(LEGACY_PICKLES):
        _check_pickle(path, start, DENSE)
    return path.stat().st_size


def _check_pickle(path: Path, file: io.BytesIO, allowed: re.Pattern) -> None:
    """Raises UserError unless the next pickle in `file` asks only for what is allowed."""
    for operation, value, _ in pickletools.genops(file):
        if "GLOBAL" in operation.name and not allowed.fullmatch(str(value)):
            raise UserError(f"{path}: expected only dense tensors, got a pickle that asks for "
                            f"{show(value)}, which may be code (nothing was executed); use "
                            "safetensors instead")


def _check_tensors(path: Path, tensors: object, held: int) -> None:
    """Raises UserError unless these are tensors by name, and `held` bytes are enough for them."""
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: expected tensors by name, got {type(tensors).__name__}; "
                        "choose a file of weights")
    storages, total = {}, 0
    for name, tensor in tensors.items():
        place = f"{path}: tensor {in_a_line(name)}"
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{place}: expected a tensor, got {type(tensor).__name__}; choose a "
                            "file of weights")
        storage = tensor.untyped_storage()
        if tensor.nbytes > storage.nbytes():
            raise damaged(place, f"expected {tensor.nbytes} bytes, got {storage.nbytes()}, which "
                                 "the file repeats")
        storages[storage.data_ptr()] = storage.nbytes()
        total += tensor.nbytes
    if sum(storages.values()) > held or total > 2 * held:       # 2: a tied matrix has two names
        raise damaged(path, f"expected {max(sum(storages.values()), total)} bytes of tensors, as "
                            f"the file describes them, got {held}")
