"""Recognises the layout of a model folder from the names of its files."""

from pathlib import Path

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import opened
from fgrlhf.engine.places import refuse_run_folder
from fgrlhf.layouts import meta
from fgrlhf.layouts.kinds import check_kind
from fgrlhf.layouts.stored import Weights

WEIGHTS = {"meta": ("consolidated.*.pth",),
           "hf": ("model*.safetensors", "pytorch_model*.bin", "model*.index.json")}


def weight_files(folder: Path, layout: str) -> list[Path]:
    return sorted(path for pattern in WEIGHTS[layout] for path in folder.glob(pattern))


def gguf_file(path: str | Path) -> Path | None:
    """Returns the GGUF file at `path`, and None for anything else.

    It is the file itself, whatever its name (Ollama's has no ".gguf"), or the only .gguf of a
    folder that holds no other weights. A config.json next to it is not read: published folders of
    GGUF files often have one of a few words. Raises UserError when such a folder has several.
    """
    path = Path(path)
    if path.is_file():
        with opened(path, gunzip=False) as file:
            return path if path.suffix == ".gguf" or file.read(4) == b"GGUF" else None
    found = sorted(path.glob("*.gguf"))
    if not found or weight_files(path, "meta") or weight_files(path, "hf") or _other_bins(path):
        return None
    if len(found) > 1:
        raise UserError(f"{path}: expected one .gguf file, got {found[0].name}, {found[1].name}"
                        f"{', ...' * (len(found) > 2)}; name the file")
    return found[0]


def read_layout(path: str | Path) -> Weights:
    """Recognises the layout of a folder, or of a GGUF or llama2.c file, and describes it."""
    path = Path(path)
    expected = "a model folder, a GGUF file, or the .bin file of llama2.c"
    if path.is_file() and (file := gguf_file(path)):
        return _read_gguf(file)
    if path.is_file() and path.suffix == ".bin" and not _is_tokenizer(path):
        return _read_llama2c(path)
    if path.is_file():
        check_kind(path, expected)
        raise UserError(f"{path}: expected {expected}, got another file; name the folder it is in")
    if not path.is_dir():
        raise UserError(f"{path}: expected {expected}, got nothing; check the path")
    refuse_run_folder(path)
    in_meta, in_hf = weight_files(path, "meta"), weight_files(path, "hf")
    if in_meta and in_hf:
        raise UserError(f"{path}: holds two checkpoints, {in_meta[0].name} and {in_hf[0].name}; "
                        "move one of them to its own folder")
    if file := gguf_file(path):
        return _read_gguf(file)
    if in_meta or (path / "params.json").exists() and not in_hf:
        return meta.read(path)
    if in_hf or (path / "config.json").exists():
        from fgrlhf.layouts import huggingface
        return huggingface.read(path)
    others = _other_bins(path)
    if len(others) == 1:
        return _read_llama2c(others[0])
    if others:
        raise UserError(f"{path}: expected one .bin file (llama2.c), got {others[0].name}, "
                        f"{others[1].name}{', ...' * (len(others) > 2)}; name the file")
    raise UserError(f"{path}: holds no model; expected params.json and consolidated.00.pth (Meta), "
                    "config.json and model.safetensors (Hugging Face), one .gguf (llama.cpp) or "
                    "one .bin (llama2.c)")


def _other_bins(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.bin") if not _is_tokenizer(file))


def _is_tokenizer(path: Path) -> bool:
    """Tells whether a .bin file is a tokenizer of llama2.c: tokenizer.bin, tok512.bin."""
    return path.name.startswith("tok")


def _read_gguf(path: Path) -> Weights:
    from fgrlhf.layouts import gguf
    return gguf.read(path)


def _read_llama2c(path: Path) -> Weights:
    from fgrlhf.layouts import llama2c
    return llama2c.read(path)
