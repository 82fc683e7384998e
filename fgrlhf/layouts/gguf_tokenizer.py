"""The tokenizer and the chat template in a GGUF file.

There are two kinds. "llama" is a sentencepiece model without its file: pieces, scores and types.
The file is built again from them. "gpt2" is a byte-level BPE.
"""

import re
import struct
from pathlib import Path

import numpy as np

from fgrlhf.bpe import BPETokenizer
from fgrlhf.data.fields import UserError, show
from fgrlhf.layouts.gguf_file import GGUFFile, open_gguf
from fgrlhf.layouts.stored import damaged
from fgrlhf.tokenizer import Tokenizer

PRETOKENISERS = {"smollm": "smollm", "llama-bpe": "llama3", "llama3": "llama3",
                 "llama-v3": "llama3", "gpt-2": "gpt2"}     # Llama 3's has three names
EXPECTED = {str: "a text", int: "an integer", bool: "true or false", list: "a list of texts",
            np.ndarray: "a list of numbers"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens


def read_tokenizer(path: str | Path) -> Tokenizer | BPETokenizer:
    """Reads the tokenizer in a file, of either kind. Its `chat_template` is that of the file.

    In a byte-level BPE, control tokens and user-defined tokens are both `control`: no text is
    encoded as one. In a sentencepiece model, user-defined tokens of the form "<|im_start|>" are
    control tokens too: chat models add them. BOS is EOS when the file names none, and is then never
    put first. Without add_bos_token, prompts begin with BOS for a sentencepiece model and for
    Llama 3's BPE, as llama.cpp has it.
    Raises UserError for another kind, another pretokeniser, and for what contradicts itself.
    """
    found = open_gguf(Path(path))
    kind = _get(found, "model", str)
    if kind not in ("gpt2", "llama"):
        raise UserError(f'{path}: tokenizer.ggml.model: expected "gpt2" or "llama", got '
                        f"{show(kind)}, which is not supported; choose another model")
    tokens, types = _read_tokens(found)
    pre = found.metadata.get("tokenizer.ggml.pre")
    adds_bos = _get(found, "add_bos_token", bool,
                    kind == "llama" or PRETOKENISERS.get(str(pre)) == "llama3")
    template = _get(found, "chat_template", str, "") or None
    ids = {"eos": _get(found, "eos_token_id", int)}
    ids["bos"] = _get(found, "bos_token_id", int, ids["eos"] if kind == "gpt2" else None)
    adds_bos &= "tokenizer.ggml.bos_token_id" in found.metadata
    for name, id in ids.items():
        if not 0 <= id < len(tokens):
            raise damaged(path, f"tokenizer.ggml.{name}_token_id: expected an id below "
                                f"{len(tokens)}, got {id}")
        types[id] = CONTROL                         # some converters forget to say it
    if kind == "llama":
        for id in np.flatnonzero(types == USER_DEFINED).tolist():
            if re.fullmatch(r"<\|.+\|>", tokens[id]):
                types[id] = CONTROL
        return Tokenizer(path, adds_bos, _sentencepiece(found, tokens, types, ids), template)
    if not isinstance(pre, str) or pre not in PRETOKENISERS:
        raise UserError(f"{path}: tokenizer.ggml.pre: expected one of {', '.join(PRETOKENISERS)}, "
                        f"got {show(pre)}, which is not supported; choose another model")
    control = {tokens[id]: id for id in range(len(tokens)) if types[id] in (CONTROL, USER_DEFINED)}
    return BPETokenizer(path, tokens, _get(found, "merges", list), PRETOKENISERS[pre], control,
                        ids["bos"], ids["eos"], adds_bos, template)


def count_pieces(path: Path) -> int:
    """Returns how many tokens the tokenizer in a file has, or how many rows the embedding has."""
    file = open_gguf(path)
    if "tokenizer.ggml.tokens" not in file.metadata:
        return file.tensors["token_embd.weight"].shape[0]
    return len(_read_tokens(file)[0])


def _get(file: GGUFFile, name: str, kind: type, default=None):
    """Returns a value of the tokenizer. Raises UserError when it is missing or of another type."""
    key = f"tokenizer.{'ggml.' * (name != 'chat_template')}{name}"
    value = file.metadata.get(key, default)
    if type(value) is not kind:
        got = show(value) if key in file.metadata else "nothing"
        raise UserError(f"{file.path}: {key}: expected {EXPECTED[kind]}, got {got}; choose a file "
                        "with a whole tokenizer")
    return value


def _read_tokens(file: GGUFFile) -> tuple[list[str], np.ndarray]:
    """Returns the tokens and their types.

    The converter names rows of the embedding beyond the tokenizer "[PAD32000]" and calls them
    unused. They are no tokens here (see `checkpoint.py`).
    """
    tokens, types = _get(file, "tokens", list), _get(file, "token_type", np.ndarray)
    if types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise damaged(file.path, f"tokenizer.ggml.token_type: expected {len(tokens)} integers, got "
                                 f"{len(types)} of {types.dtype}")
    count = len(tokens)
    while count and types[count - 1] == UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    if len(set(tokens[:count])) < count or "" in tokens[:count]:
        raise damaged(file.path, "tokenizer.ggml.tokens: expected distinct texts, got the same "
                                 "twice, or an empty text")
    return tokens[:count], types[:count].astype(np.int64)


def _sentencepiece(file: GGUFFile, tokens: list[str], types: np.ndarray,
                   ids: dict[str, int]) -> bytes:
    """Builds a sentencepiece model, the protocol buffer of a tokenizer.model."""
    scores = _get(file, "scores", np.ndarray)
    if scores.dtype.kind != "f" or len(scores) < len(tokens):
        raise damaged(file.path, f"tokenizer.ggml.scores: expected {len(tokens)} numbers, got "
                                 f"{len(scores)} of {scores.dtype}")
    unknown = np.flatnonzero(types == UNKNOWN)
    if len(unknown) != 1 or not set(types) <= set(range(1, 7)):
        raise damaged(file.path, "tokenizer.ggml.token_type: expected types 1 to 6, and one "
                                 f"unknown (2), got {len(unknown)} unknown")
    if len(file.metadata.get("tokenizer.ggml.precompiled_charsmap", "")):
        raise UserError(f"{file.path}: tokenizer.ggml.precompiled_charsmap: expected none, got a "
                        "normalisation, which is not supported; choose another model")
    pieces = [_field(1, _field(1, token.encode()) + _field(2, struct.pack("<f", score), 5)
                     + _field(3, type)) for token, score, type in zip(
                         tokens, scores.tolist(), types.tolist())]
    ids = {"unk": int(unknown[0])} | ids
    trainer = _field(3, 2) + _field(4, len(tokens)) + _field(35, int(BYTE in types)) + b"".join(
        _field(40 + n, ids[name]) + _field(45 + n, tokens[ids[name]].encode())
        for n, name in enumerate(("unk", "bos", "eos")))                # 2: BPE
    adds_blank = _get(file, "add_space_prefix", bool, True)
    removes = _get(file, "remove_extra_whitespaces", bool, False)
    normaliser = (_field(1, b"identity") + _field(3, int(adds_blank)) + _field(4, int(removes))
                  + _field(5, 1))
    return b"".join(pieces) + _field(2, trainer) + _field(3, normaliser)


def _field(number: int, value: bytes | int, wire: int = 2) -> bytes:
    """Writes a field of a protocol buffer: an integer, bytes, or with `wire` 5 a float32."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | wire) + (_varint(len(value)) if wire == 2 else b"") + value


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes(data + bytes([value]))
