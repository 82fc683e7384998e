"""Models in and out of folders: written whole or not at all, read without running code.

    load_model(path)          any layout of fgrlhf/layouts, recognised from the files
    save_model(model, path)   Meta's layout, which is the project's own, or Hugging Face's
    load_tokenizer(path)      the tokenizer.model in the same folder

A model is described on the meta device and filled one tensor at a time. Loading therefore needs the
memory of the model and of one more tensor. `load_model(path, device="meta")` checks every name and
shape of a checkpoint of any size and reads no weights. The code of a layout is imported when a
folder needs it.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_bytes, write_atomic
from fgrlhf.engine import lora
from fgrlhf.layouts import meta
from fgrlhf.layouts.stored import Stored, Weights
from fgrlhf.model import LLaMA
from fgrlhf.tokenizer import Tokenizer


WEIGHTS = {"meta": ("consolidated.*.pth",),
           "hf": ("model*.safetensors", "pytorch_model*.bin", "model*.index.json")}


def _weight_files(folder: Path, layout: str) -> list[Path]:
    return sorted(path for pattern in WEIGHTS[layout] for path in folder.glob(pattern))


def read_layout(path: str | Path) -> Weights:
    """Recognises the layout of a folder, or of one llama2.c file, and describes what it holds."""
    path = Path(path)
    if path.is_file() and path.suffix == ".bin":
        return _read_llama2c(path)
    if not path.is_dir():
        raise UserError(f"{path}: expected a model folder, or the .bin file of llama2.c")
    in_meta, in_hf = _weight_files(path, "meta"), _weight_files(path, "hf")
    if in_meta and in_hf:
        raise UserError(f"{path}: holds two checkpoints, {in_meta[0].name} and {in_hf[0].name}; "
                        "move one of them to its own folder")
    if in_meta or (path / "params.json").exists() and not in_hf:
        return meta.read(path)
    if in_hf or (path / "config.json").exists():
        from fgrlhf.layouts import huggingface
        return huggingface.read(path)
    others = sorted(path.glob("*.bin"))
    if len(others) == 1:
        return _read_llama2c(others[0])
    raise UserError(f"{path}: holds no model; expected params.json and consolidated.00.pth (Meta), "
                    "config.json and model.safetensors (Hugging Face) or one .bin (llama2.c)")


def _read_llama2c(path: Path) -> Weights:
    from fgrlhf.layouts import llama2c
    return llama2c.read(path)


def load_model(path: str | Path, device: str | torch.device = "cpu",
               dtype: torch.dtype | None = None) -> LLaMA:
    """Reads the model in a folder, or in a llama2.c file, in any layout.

    A folder of adapters gives the adapters merged with their trunk. `device` may be "meta". With
    dtype None the model keeps the dtype of the stored embedding. Raises UserError with the file and
    the tensor for anything that is missing, unknown, truncated or of the wrong shape, and when the
    size of the tokenizer differs from the vocabulary.
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
    """Reads a LLaMA with adapters: those in the folder, or new ones of `rank` over its weights.

    `trunks` holds the trunks read so far, by folder; models that are loaded with the same dict
    share them. Raises UserError when the folder's adapters have another rank.
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
    """Raises UserError unless the names and shapes are those expected, in floating point."""
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
    """Reads the tokenizer in a model folder, or in the folder of a llama2.c file."""
    return Tokenizer(_tokenizer_path(path))


def save_model(model: LLaMA, path: str | Path, layout: str = "meta",
               tokenizer: Tokenizer | None = None) -> None:
    """Writes a model folder. Each file is written atomically, and last the JSON that completes it.

    layout "meta" is the project's own; Meta's code can read it once the keys "max_seq_len" and
    "tie_embeddings" are removed. layout "hf" can be read by transformers, vLLM and, when a
    `tokenizer` is given, llama.cpp's converter. The weights keep their dtype, and reading them back
    is bit-exact. The file of the `tokenizer` is copied. For an adapted model only the adapters are
    written, with the path of their trunk. Raises UserError when the folder holds another
    checkpoint, which a reader would mix up with this one, or when the tokenizer belongs to another
    model.
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
        from fgrlhf.layouts import huggingface
        from fgrlhf.layouts.safetensors import write_safetensors
        write_safetensors(own, huggingface.to_hf(parameters, model.config))
    if tokenizer is not None:
        write_atomic(folder / "tokenizer.model", read_bytes(tokenizer.path))
    for name, values in _settings(model, layout, tokenizer).items():
        write_atomic(folder / name, (json.dumps(values, indent=2) + "\n").encode())


def _settings(model: LLaMA, layout: str, tokenizer: Tokenizer | None) -> dict[str, dict]:
    """The JSON files of a model folder. The last one completes the folder."""
    config, dtype = model.config, model.tok_embeddings.weight.dtype
    if layout == "meta":
        return {"params.json": meta.write_params(config)}
    from fgrlhf.layouts import huggingface, huggingface_tokenizer
    last = {"config.json": huggingface.write_config(config, dtype, tokenizer)}
    if tokenizer is None:
        return last
    return {
        "tokenizer.json": huggingface_tokenizer.write_tokenizer(tokenizer),
        "tokenizer_config.json": huggingface_tokenizer.write_tokenizer_config(
            tokenizer, config.max_seq_len)} | last
