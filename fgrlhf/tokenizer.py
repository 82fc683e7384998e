"""SentencePiece as LLaMA uses it: text <-> ids without loss, and the characters each id stands for.

Every id stands for a fixed string of bytes, and decoding is nothing but their concatenation read as
UTF-8. `decode`, `stream` and `spans` therefore agree by construction:

    control piece (BOS, EOS)    none              byte piece <0xE2>    that byte
    unknown                     those of " ⁇ "    any other piece      its text, "▁" as a blank

Two things differ from a bare SentencePieceProcessor. The character "▁" (U+2581), which it uses
for the blank and so cannot tell from one, is encoded by its three byte pieces: any text comes back
exactly. And there is a PAD: the unknown id, which exists in every model (no row is added to the
embedding), is never EOS and never encodes text; padding is inert as masks come from lengths.
"""

import codecs
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from fgrlhf.config import UserError
from fgrlhf.files import write_atomic

BLANK = "▁"                                 # sentencepiece writes the blank as U+2581


class Piece(NamedTuple):
    """One entry of the vocabulary."""

    text: str
    score: float                            # BPE joins the neighbours whose union has the highest
    ordinary: bool                          # stands for its text: no control piece, byte or unknown


class Tokenizer:
    """A sentencepiece model file.

    vocab_size, bos_id, eos_id, pad_id (never eos_id): int; pieces: list of Piece, by id;
    adds_blank: whether "a" is encoded as " a", as LLaMA does; sha256: hex digest of the file.
    Raises UserError when the file is missing, is no sentencepiece model, or lacks BOS or EOS.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such tokenizer file; expected a sentencepiece model "
                            "(tokenizer.model)")
        model = self.path.read_bytes()
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(model)
            self.vocab_size = self._sp.vocab_size()
        except RuntimeError:
            self.vocab_size = 0
        if self.vocab_size == 0:
            raise UserError(f"{path}: not a sentencepiece model ({len(model)} bytes); "
                            "copy tokenizer.model again")
        self.bos_id, self.eos_id = self._sp.bos_id(), self._sp.eos_id()
        self.pad_id = self._sp.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{path}: the model needs a BOS and an EOS piece, as LLaMA's has; "
                            f"got bos_id {self.bos_id}, eos_id {self.eos_id}")
        self.pieces = [self._piece(id) for id in range(self.vocab_size)]
        self.adds_blank = self._sp.normalize("a").startswith(BLANK)
        self._bytes = [self._piece_bytes(id) for id in range(self.vocab_size)]
        self._blank_ids = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in BLANK.encode()]

    def _piece(self, id: int) -> Piece:
        sp = self._sp
        return Piece(sp.id_to_piece(id), sp.get_score(id),
                     not (sp.is_control(id) or sp.is_unknown(id) or sp.is_byte(id)))

    def _piece_bytes(self, id: int) -> bytes:
        if self._sp.is_control(id):
            return b""
        if self._sp.is_unknown(id):
            return " ⁇ ".encode()
        if self._sp.is_byte(id):
            return bytes([int(self.pieces[id].text[3:5], 16)])
        return self.pieces[id].text.replace(BLANK, " ").encode()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Text -> ids: sentencepiece's own, for all text without "▁".

        Raises UserError on a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"text: character {error.start} is a lone surrogate, which UTF-8 "
                            "cannot hold; repair the text") from None
        if BLANK in text and self._sp.is_byte(self._blank_ids[0]):
            ids = self._encode_with_literal_blank(text)
        else:
            ids = self._sp.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def _encode_with_literal_blank(self, text: str) -> list[int]:
        """Encode with a character no piece contains for "▁", then put the bytes of "▁" there."""
        stand_in = next(c for c in map(chr, range(0x10FFFD, 0x10F000, -1))   # private use
                        if c not in text and self._sp.is_unknown(self._sp.piece_to_id(c)))
        marker = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in stand_in.encode()]
        ids, result = self._sp.encode(text.replace(BLANK, stand_in)), []
        for id in ids:
            result.append(id)
            if result[-len(marker):] == marker:
                result[-len(marker):] = self._blank_ids
        return result

    def _surfaces(self, ids: Iterable[int]) -> Iterator[bytes]:
        """The bytes of each id, without the blank that encoding put before the text."""
        at_start = self.adds_blank
        for id in ids:
            surface = self._bytes[id]
            if at_start and surface:
                at_start = False
                if self.pieces[id].ordinary:
                    surface = surface.removeprefix(b" ")
            yield surface

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; BOS and EOS vanish, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._surfaces(ids)).decode(errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `decode` in parts, each as soon as an id completes at least one character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for surface in self._surfaces(ids):
            if text := decoder.decode(surface):
                yield text
        if text := decoder.decode(b"", final=True):         # ended inside a character
            yield text

    def spans(self, ids: Iterable[int]) -> list[tuple[int, int]]:
        """For each id the half-open range of characters of `decode(ids)` that it touches.

        A character spelled by several byte pieces belongs to each of them; BOS and EOS have empty
        spans. (The library's own offsets count bytes, and only for text it has encoded itself.)
        """
        surfaces = list(self._surfaces(ids))
        home = character_of_byte(b"".join(surfaces))
        spans, end = [], 0                                  # end: bytes so far
        for surface in surfaces:
            start, end = end, end + len(surface)
            before = home[start - 1] + 1 if start else 0    # characters so far
            spans.append((home[start], home[end - 1] + 1) if surface else (before, before))
        return spans


def character_of_byte(data: bytes) -> list[int]:
    """[bytes] which character of data.decode(errors="replace") each byte lies in.

    (An incremental decoder, fed byte by byte, says so too late where bytes spell a surrogate.)
    """
    home, count = [], 0
    while len(home) < len(data):
        rest, broken = data[len(home):], 0
        try:
            whole = rest.decode()
        except UnicodeDecodeError as error:                 # the first bytes that are no UTF-8
            whole, broken = rest[:error.start].decode(), error.end - error.start
        sizes = [len(character.encode()) for character in whole] + [broken] * (broken > 0)
        for size in sizes:
            home += [count] * size
            count += 1
    return home


def train(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Train a small model of LLaMA's kind on `texts`, write it to `path` and open it.

    BPE with byte fallback, identity normalisation, blanks kept, each digit its own piece; a newline
    is the byte piece <0x0A>. Ids 0, 1, 2 are unknown, BOS and EOS, the next 256 the bytes. The same
    texts give the same file.
    Raises UserError when the texts cannot give exactly `vocab_size` pieces, with what they can.
    """
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise UserError(f"{path}: no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe",
            vocab_size=vocab_size, byte_fallback=True, character_coverage=0.99995,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, num_threads=1,
            max_sentence_length=max(10, *(len(line.encode()) + 1 for line in lines)), minloglevel=2)
    except RuntimeError as error:
        if limit := re.search(r"set it to a value <= (\d+)", str(error)):
            hint = f"the texts give at most {limit[1]}"
        elif limit := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            hint = f"3 special pieces, 256 bytes and the characters of the texts need {limit[1]}"
        else:
            raise
        raise UserError(f"{path}: expected a vocabulary of {vocab_size} pieces; {hint}") from None
    write_atomic(path, model.getvalue())
    return Tokenizer(path)
