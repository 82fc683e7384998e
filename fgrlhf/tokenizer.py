"""SentencePiece as LLaMA uses it: text <-> ids, and the characters that each id stands for.

Every id has a fixed string of bytes. Decoding concatenates these bytes and reads them as UTF-8, so
`decode`, `stream` and `spans` always agree:

    control piece (BOS, EOS)    no bytes          byte piece <0xE2>    this byte
    unknown                     those of " ⁇ "    any other piece      its text, "▁" as a blank

Two things differ from a SentencePieceProcessor. First, sentencepiece writes the blank as "▁"
(U+2581) and cannot tell the two apart. Here the character is encoded by its three byte pieces, so
that decoding gives back any text exactly. Second, there is a PAD id. It is the unknown id, which
exists in every model (no row is added to the embedding), is never EOS and never encodes text. PAD
changes no result, because masks come from lengths.

LLaMA's own tokenizer keeps every text exactly. A tokenizer with sentencepiece's default normaliser
does not: `keeps` tells for a text, and `offsets` finds the characters of each id all the same.
"""

import codecs
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import write_atomic
from fgrlhf.layouts.kinds import check_kind

BLANK = "▁"                                 # sentencepiece writes the blank as U+2581
LARGEST = 64 << 20                          # bytes of a model file; LLaMA's has half a million


class Piece(NamedTuple):
    """An entry of the vocabulary."""

    text: str
    score: float                            # BPE first joins the pair whose union scores highest
    ordinary: bool                          # not a control piece, a byte or unknown


class Vocabulary:
    """The half of a tokenizer that both kinds share: each id has a fixed string of bytes.

    A subclass has `encode`, and `_surfaces`, which yields the bytes of each id.
    """

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids. BOS and EOS give no text, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._surfaces(ids)).decode(errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of `decode` in parts, each as soon as an id completes a character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for surface in self._surfaces(ids):
            if text := decoder.decode(surface):
                yield text
        if text := decoder.decode(b"", final=True):         # ended inside a character
            yield text

    def spans(self, ids: Iterable[int]) -> list[tuple[int, int]]:
        """Returns, for each id, the half-open range of characters of `decode(ids)` that it covers.

        A character that consists of several byte pieces belongs to each of them. BOS and EOS have
        empty spans. (sentencepiece's own offsets count bytes, and only for text it has encoded.)
        """
        surfaces = list(self._surfaces(ids))
        home = character_of_byte(b"".join(surfaces))
        spans, end = [], 0                                  # end: bytes so far
        for surface in surfaces:
            start, end = end, end + len(surface)
            before = home[start - 1] + 1 if start else 0    # characters so far
            spans.append((home[start], home[end - 1] + 1) if surface else (before, before))
        return spans

    def texts(self, ids: Iterable[int]) -> list[str]:
        """Returns the characters that each id adds to the text. Joined, they are `decode(ids)`.

        A character of several byte pieces belongs to the first of them.
        """
        ids, end, parts = list(ids), 0, []
        text = self.decode(ids)
        for start, stop in self.spans(ids):
            parts.append(text[max(start, end):stop])
            end = max(end, stop)
        return parts

    def keeps(self, text: str) -> bool:
        """Returns True if decoding gives the text back exactly."""
        return self.decode(self.encode(text)) == text


class Tokenizer(Vocabulary):
    """A sentencepiece model file, or its bytes in `model` when `path` is a file that contains it.

    Attributes: model, the bytes of the file; vocab_size, bos_id, eos_id, pad_id (never eos_id);
    pieces, a list of Piece by id; adds_blank, True if "a" is encoded as " a", as in LLaMA;
    adds_bos, False if `encode` never puts BOS first, as some models want; control, the ids of the
    control pieces by their text, BOS and EOS included; chat_template, the model's own template,
    which is never executed, or None; sha256 of the file, and of adds_bos where it is False, in
    hexadecimal. Raises UserError when the file is missing, is not a sentencepiece model, or lacks
    BOS or EOS.
    """

    def __init__(self, path: str | Path, adds_bos: bool = True, model: bytes | None = None,
                 chat_template: str | None = None):
        self.path, self.adds_bos, self.chat_template = Path(path), adds_bos, chat_template
        if model is None:
            check_kind(path, "a sentencepiece model (tokenizer.model)")
            if (size := self.path.stat().st_size) > LARGEST:
                raise UserError(f"{path}: expected a sentencepiece model of at most {LARGEST} "
                                f"bytes, got {size}; copy tokenizer.model again")
            model = self.path.read_bytes()
        self.model = model
        self.sha256 = hashlib.sha256(model + (b"" if adds_bos else b"no BOS")).hexdigest()
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(model)
            self.vocab_size = self._sp.vocab_size()
            self.pieces = [self._piece(id) for id in range(self.vocab_size)]
        except (RuntimeError, UnicodeDecodeError):
            self.vocab_size = 0
        if self.vocab_size == 0:
            raise UserError(f"{path}: expected a sentencepiece model, got {len(model)} bytes of "
                            "something else; copy tokenizer.model again")
        self.bos_id, self.eos_id = self._sp.bos_id(), self._sp.eos_id()
        self.pad_id = self._sp.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{path}: expected a BOS and an EOS piece, as in LLaMA's, got bos_id "
                            f"{self.bos_id}, eos_id {self.eos_id}; choose another tokenizer")
        self.control = {piece.text: id for id, piece in enumerate(self.pieces)
                        if self._sp.is_control(id)}
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
        """Encodes a text. The ids are those of sentencepiece for all text without "▁".

        bos, eos: whether to put BOS first (never if `adds_bos` is False) and EOS last.
        Raises UserError for a lone surrogate.
        """
        check_text(text)
        if BLANK in text and self._sp.is_byte(self._blank_ids[0]):
            ids = self._encode_with_literal_blank(text)[0]
        else:
            ids = self._sp.encode(text)
        return [self.bos_id] * (bos and self.adds_bos) + ids + [self.eos_id] * eos

    def _encode_with_literal_blank(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes "▁" as a character that is in no piece, and then puts the bytes of "▁" there.

        Returns the ids, and the characters of the text that each stands for.
        """
        stand_in = next(c for c in map(chr, range(0x10FFFD, 0x10F000, -1))   # private use
                        if c not in text and self._sp.is_unknown(self._sp.piece_to_id(c)))
        marker = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in stand_in.encode()]
        found = self._sp.encode(text.replace(BLANK, stand_in), return_type="offset_mapping")
        ids, offsets = [], []
        for id, span in zip(found["ids"], found["offsets"]):
            ids.append(id)
            offsets.append(span)
            if ids[-len(marker):] == marker:
                ids[-len(marker):] = self._blank_ids
                offsets[-len(marker):] = [span] * len(self._blank_ids)
        return ids, offsets

    def _surfaces(self, ids: Iterable[int]) -> Iterator[bytes]:
        """Yields the bytes of each id, without the blank that encoding put before the text."""
        at_start = self.adds_blank
        for id in ids:
            surface = self._bytes[id]
            if at_start and surface:
                at_start = False
                if self.pieces[id].ordinary:
                    surface = surface.removeprefix(b" ")
            yield surface

    def offsets(self, text: str, eos: bool = False) -> list[tuple[int, int]]:
        """Returns, for each id of encode(text, eos=eos), the half-open range of characters of text.

        A tokenizer of LLaMA's kind keeps all text, and the ranges are those of `spans`. Others
        change it: they remove blanks or normalise characters ("½" to "1⁄2"). The ranges then come
        from sentencepiece, which follows each id back through its normaliser. Ids that share a
        character all have its range; a blank that encoding puts before or behind the text has an
        empty range, and so has EOS. Text that the tokenizer removes is in the range of the id
        behind it, or in none at the end.
        """
        ids = self.encode(text)
        if self.decode(ids) == text:
            ranges = self.spans(ids)
        else:
            if BLANK in text and self._sp.is_byte(self._blank_ids[0]):
                ranges = self._encode_with_literal_blank(text)[1]
            else:
                ranges = self._sp.encode(text, return_type="offset_mapping")["offsets"]
            following = (len(text), len(text))
            for k in reversed(range(len(ids))):
                # sentencepiece gives a shared character to the last of its ids.
                if ranges[k][0] == ranges[k][1] and self._bytes[ids[k]] != b" ":
                    ranges[k] = following
                following = ranges[k]
        return ranges + [(len(text), len(text))] * eos


def check_text(text: str) -> None:
    """Raises UserError for a lone surrogate, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text: character {error.start} is a lone surrogate, which UTF-8 "
                        "cannot hold; repair the text") from None


def character_of_byte(data: bytes) -> list[int]:
    """Returns, for each byte, the index of its character in data.decode(errors="replace").

    (An incremental decoder would tell this too late when the bytes spell a surrogate.)
    """
    home, count = [], 0
    while len(home) < len(data):
        rest, broken = data[len(home):], 0
        try:
            whole = rest.decode()
        except UnicodeDecodeError as error:                 # the first bytes that are not UTF-8
            whole, broken = rest[:error.start].decode(), error.end - error.start
        sizes = [len(character.encode()) for character in whole] + [broken] * (broken > 0)
        for size in sizes:
            home += [count] * size
            count += 1
    return home


def train(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Trains a small model of LLaMA's kind on `texts`, writes it to `path` and opens it.

    It is BPE with byte fallback and without normalisation. Blanks are kept, each digit is a piece,
    and a newline is the byte piece <0x0A>. Ids 0, 1, 2 are unknown, BOS and EOS; the next 256 are
    the bytes. The same texts give the same file. Raises UserError when the texts cannot give
    exactly `vocab_size` pieces, with the number that is possible.
    """
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise UserError(f"{path}: expected text to train a tokenizer on, got none")
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
            hint = f"got texts that give at most {limit[1]}"
        elif limit := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            hint = f"got texts that need {limit[1]} (3 special pieces, 256 bytes, characters)"
        else:
            raise
        raise UserError(f"{path}: vocabulary: expected {vocab_size} pieces, {hint}; choose another "
                        "size") from None
    write_atomic(path, model.getvalue())
    return Tokenizer(path)
