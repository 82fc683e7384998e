"""Models in and out of folders, and training states: whole or not at all, never a line of code.

    load_model(path)     any layout of `layouts`          load_state(path)     a training state
    save_model(model)    Meta's (our own) or HF's         save_state(path)
    load_tokenizer(path) the tokenizer.model beside the weights

A model is described on the meta device and filled one tensor at a time, so loading needs the
model's own memory and one tensor more. `load_model(path, device="meta")` checks every name and
shape of a checkpoint of any size and reads no weights.
"""

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from fgrlhf import lora
from fgrlhf.config import UserError
from fgrlhf.files import read_bytes, write_atomic
from fgrlhf.layouts import huggingface, huggingface_tokenizer, llama2c, meta
from fgrlhf.layouts.stored import Stored, Weights
from fgrlhf.model import LLaMA
from fgrlhf.safetensors import write_safetensors
from fgrlhf.tokenizer import Tokenizer


WEIGHTS = {"meta": ("consolidated.*.pth",),
           "hf": ("model*.safetensors", "pytorch_model*.bin", "model*.index.json")}


def _weight_files(folder: Path, layout: str) -> list[Path]:
    return sorted(path for pattern in WEIGHTS[layout] for path in folder.glob(pattern))


def read_layout(path: str | Path) -> Weights:
    """Recognise the layout of a folder (or of one llama2.c file) and describe what it holds."""
    path = Path(path)
    if path.is_file() and path.suffix == ".bin":
        return llama2c.read(path)
    if not path.is_dir():
        raise UserError(f"{path}: expected a model folder, or the .bin file of llama2.c")
    in_meta, in_hf = _weight_files(path, "meta"), _weight_files(path, "hf")
    if in_meta and in_hf:
        raise UserError(f"{path}: holds two checkpoints, {in_meta[0].name} and {in_hf[0].name}; "
                        "move one of them to its own folder")
    if in_meta or (path / "params.json").exists() and not in_hf:
        return meta.read(path)
    if in_hf or (path / "config.json").exists():
        return huggingface.read(path)
    others = sorted(path.glob("*.bin"))
    if len(others) == 1:
        return llama2c.read(others[0])
    raise UserError(f"{path}: holds no model; expected params.json and consolidated.00.pth (Meta), "
                    "config.json and model.safetensors (Hugging Face) or one .bin (llama2.c)")


def load_model(path: str | Path, device: str | torch.device = "cpu",
               dtype: torch.dtype | None = None) -> LLaMA:
    """The model in a folder (or llama2.c file), its layout recognised from the files.

    A folder of adapters gives them merged with their trunk. device may be "meta"; dtype None keeps
    that of the stored embedding. Raises UserError naming the file and the tensor for anything
    missing, unknown, truncated or of the wrong shape, and when the tokenizer beside the weights has
    another size than the vocabulary.
    """
    if lora.is_folder(path):
        return lora.merge(load_adapted(path, device, dtype))
    config, tensors = read_layout(path)
    with torch.device("meta"):
        model = LLaMA(config)
    expected = dict(model.named_parameters())
    _check(path, expected, tensors)
    beside = _tokenizer_path(path)
    if beside.exists() and (size := Tokenizer(beside).vocab_size) != config.vocab_size:
        raise UserError(f"{beside}: expected {config.vocab_size} pieces, the model's vocabulary, "
                        f"got {size}; put the model's own tokenizer there")
    dtype = dtype or tensors["tok_embeddings.weight"].dtype
    for name in expected:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf,
                nn.Parameter(tensors[name].read(device).to(dtype)))
    return model


def load_adapted(path: str | Path, device: str | torch.device = "cpu",
                 dtype: torch.dtype | None = None, rank: int | None = None, seed: int = 0,
                 trunks: dict[Path, LLaMA] | None = None) -> LLaMA:
    """A LLaMA with adapters: those in the folder, else fresh ones of `rank` over its weights.

    `trunks` holds the trunks read so far, by folder: models loaded with one dict share them. Raises
    UserError when the folder's adapters have another rank than the one asked for.
    """
    fresh, trunks = not lora.is_folder(path), {} if trunks is None else trunks
    if not fresh:
        about = lora.describe(path)
        if rank not in (None, about["rank"]):
            raise UserError(f"{path}: its adapters have rank {about['rank']}; give --lora-rank "
                            f"{about['rank']}, or 0 to train all weights with them merged")
        rank = about["rank"]
    base = Path(path if fresh else about["base"]).resolve()
    if base not in trunks:
        trunks[base] = load_model(base, device, dtype)
    model = lora.adapt(trunks[base], rank, seed)
    model.base = str(base)
    return model if fresh else lora.restore(model, path)


def _check(path: str | Path, expected: dict[str, Tensor], tensors: dict[str, Stored]) -> None:
    """The same names, the same shapes, floating point."""
    for name, stored in tensors.items():
        if name not in expected:
            raise UserError(f"{stored.file}: tensor {stored.name}: unknown; the sizes beside it "
                            "describe a LLaMA without it")
    for name, parameter in expected.items():
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing; the checkpoint is incomplete")
        stored = tensors[name]
        if stored.shape != tuple(parameter.shape):
            raise UserError(f"{stored.file}: tensor {stored.name}: "
                            f"expected {tuple(parameter.shape)}, got {stored.shape}")
        if stored.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{stored.file}: tensor {stored.name}: expected floating point, "
                            f"got {stored.dtype}; quantised weights are not supported")


def _tokenizer_path(path: str | Path) -> Path:
    path = Path(path)
    return (path.parent if path.is_file() else path) / "tokenizer.model"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer beside the weights of a model folder or llama2.c file."""
    return Tokenizer(_tokenizer_path(path))


def save_model(model: LLaMA, path: str | Path, layout: str = "meta",
               tokenizer: Tokenizer | None = None) -> None:
    """Write a model folder, each file atomically and the JSON that makes it one last.

    layout "meta" is the project's own and can be read by Meta's code once the keys "max_seq_len"
    and "tie_embeddings" are dropped; "hf" is read by transformers, vLLM and llama.cpp's converter,
    the last only with a `tokenizer`. The weights keep their dtype; either way round is bit-exact.
    With a `tokenizer` its file is copied. Raises UserError when the folder holds another
    checkpoint, which a reader would mix up with this one, or the tokenizer is another model's.
    Of an adapted model the adapters alone are written, beside the path of their trunk.
    """
    if layout not in WEIGHTS:
        raise ValueError(f'layout: expected "meta" or "hf", got {layout!r}')
    if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f"{tokenizer.path}: expected {model.config.vocab_size} pieces, the model's "
                        f"vocabulary, got {tokenizer.vocab_size}")
    folder = Path(path)
    if lora.adapters(model):
        if tokenizer is not None:
            write_atomic(folder / "tokenizer.model", read_bytes(tokenizer.path))
        lora.save(model, folder, model.base)
        return
    own = folder / ("consolidated.00.pth" if layout == "meta" else "model.safetensors")
    for other in _weight_files(folder, "meta") + _weight_files(folder, "hf"):
        if other != own:
            raise UserError(f"{folder}: already holds {other.name}; choose an empty folder")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    if layout == "meta":
        parameters = {name: p.cpu().contiguous() for name, p in parameters.items()}
        write_atomic(own, lambda file: torch.save(parameters, file))
    else:
        write_safetensors(own, huggingface.to_hf(parameters, model.config))
    if tokenizer is not None:
        write_atomic(folder / "tokenizer.model", read_bytes(tokenizer.path))
    for name, values in _settings(model, layout, tokenizer).items():
        write_atomic(folder / name, (json.dumps(values, indent=2) + "\n").encode())


def _settings(model: LLaMA, layout: str, tokenizer: Tokenizer | None) -> dict[str, dict]:
    """The JSON files beside the weights; last the one without which the folder is no model."""
    config, dtype = model.config, model.tok_embeddings.weight.dtype
    if layout == "meta":
        return {"params.json": meta.write_params(config)}
    last = {"config.json": huggingface.write_config(config, dtype, tokenizer)}
    if tokenizer is None:
        return last
    return {
        "tokenizer.json": huggingface_tokenizer.write_tokenizer(tokenizer),
        "tokenizer_config.json": huggingface_tokenizer.write_tokenizer_config(
            tokenizer, config.max_seq_len)} | last


class _Hashing:
    """A binary file that is hashed as it is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha = file, hashlib.sha256()

    def write(self, data) -> int:
        self.sha.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_state(path: str | Path, state: dict) -> None:
    """Write a training state atomically; the file's last 32 bytes are the sha256 of all before.

    `state`: dicts, lists and tuples of tensors, numbers, strings, bytes, booleans and None.
    Raises TypeError naming the entry for anything else: it could not be read without running code.
    """
    _check_plain(state, "state")

    def write(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        torch.save(state, hashing)
        file.write(hashing.sha.digest())

    write_atomic(path, write)


def load_state(path: str | Path) -> dict:
    """A training state of `save_state`, on the CPU. Raises UserError when a bit has changed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such training state")
    sha, left = hashlib.sha256(), path.stat().st_size - 32
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            sha.update(block)
            left -= len(block)
        intact = file.read() == sha.digest()
    if not intact:
        raise UserError(f"{path}: damaged, or no training state: its contents do not match their "
                        "checksum; use an older one")
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_plain(value: object, name: str) -> None:
    """Raise TypeError for what could not be loaded without running code."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, name)
            _check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            _check_plain(item, f"{name}[{number}]")
    elif not isinstance(value, Tensor | bool | int | float | str | bytes | None):
        raise TypeError(f"{name}: expected a tensor, number, string, bytes, None, or a dict, "
                        f"list or tuple of these, got {type(value).__name__}")
