"""Tokenizer cases: text to ids, ids to text, and the characters that each id stands for.

The vocabulary is trained in process on the lines below (sentencepiece BPE with byte fallback, as in
LLaMA). The expected ids are sentencepiece's own. Texts and offsets count Unicode code points.
"""

import tempfile
from pathlib import Path

import torch

from fgrlhf.golden.case import Case
from fgrlhf.tokenizer import Piece, Tokenizer, train

LINES = ("the cat sat on the mat, the dog sat on the log.", "12 cats and 34 dogs\nsat  and sat.",
         "  the mat, the log, the café", "a minimal edit changes few words of the answer",
         "aah aaah baa") * 3
TEXTS = ("", "a", " a", "the cat sat", "  two  blanks ", "\n\nlines\tand tabs", "café e\u0301",
         "😀 the 👩\u200d🚀", "你好, the log", "1234 cats", "\x00", "<s> the </s>", "a▁b ▁", "\u3000a",
         "baaa aaaaa", "ogs oge")                      # the last two: which neighbours join first
# Bytes, one id each, most of them invalid UTF-8: the ends of each range that the standard allows.
BYTES = ("F0 9F 98", "E2 61", "FF 80 C3 A9", "E0 80 80", "ED A0 80", "F4 90 80 80", "C1 BF",
         "F0 9F 98 80 80", "DF BF", "EF BF BF", "F4 8F BF BF", "F5 80", "C3 C0", "C3 7F",
         "E1 C0", "E1 80 C0", "E0 9F BF", "ED 9F BF", "F0 8F BF BF", "F1 BF C0", "F1 80 80 C0",
         "F1 C0 80 80", "C2 80", "C3 80", "E0 A0 80", "E1 80 80", "F0 90 80 80", "20 41")


def tokenizer() -> Tokenizer:
    """Trains the tokenizer of the cases."""
    with tempfile.TemporaryDirectory() as folder:
        return train(LINES, 310, Path(folder) / "tokenizer.model")


def vocabulary(made: Tokenizer) -> list[list]:
    """[text, score, kind] of each id. The kinds are unknown, control, byte and text."""
    def kind(id: int, piece: Piece) -> str:
        if piece.ordinary:
            return "text"
        return "unknown" if id == 0 else "control" if id < 3 else "byte"
    return [[piece.text, piece.score, kind(id, piece)] for id, piece in enumerate(made.pieces)]


def cases() -> list[Case]:
    made = tokenizer()
    pieces = vocabulary(made)
    encoded = [made.encode(text, bos=True, eos=True) for text in TEXTS]
    encode = Case(
        "tokenizer-encode", "LLaMA", "-",
        "BOS, the ids of the text, EOS. Put a blank in front of the text unless it is empty, and "
        "write blanks as U+2581. Then join two neighbours, again and again until no union is a "
        "text piece: always those whose union has the highest score, the left-most of equals. A "
        "character that is no piece becomes its UTF-8 bytes, and so does a U+2581 of the text "
        "itself. ids: of all texts, one after the other. lengths: ids of each text. pieces[id] = "
        "[text, score, kind].",
        {"bos_id": made.bos_id, "eos_id": made.eos_id}, {"pieces": pieces, "texts": list(TEXTS)},
        {"ids": torch.tensor([id for ids in encoded for id in ids]),
         "lengths": torch.tensor([len(ids) for ids in encoded])})

    rows = encoded + [[int(byte, 16) + 3 for byte in line.split()] for line in BYTES]
    decoded = [made.decode(ids) for ids in rows]
    decode = Case(
        "tokenizer-decode", "LLaMA", "-",
        "The bytes of the ids, read as UTF-8. Invalid bytes become U+FFFD, once for each maximal "
        "part of a character, as Unicode recommends. Control pieces have no bytes, a U+2581 is a "
        "blank, and the first piece that has bytes loses its leading blank. characters: code "
        "points of all texts, one after the other. lengths: characters of each text. spans[k]: "
        "the half-open range of characters of its text that id k touches, empty when id k has no "
        "bytes.",
        {}, {"pieces": pieces, "ids": rows},
        {"characters": torch.tensor([ord(c) for text in decoded for c in text]),
         "lengths": torch.tensor([len(text) for text in decoded]),
         "spans": torch.tensor([span for ids in rows for span in made.spans(ids)])})
    return [encode, decode]
