"""Byte-level BPE as GPT-2, SmolLM2 and Llama 3 use it: text <-> ids, without another package.

A text becomes ids in three steps:

    1. A pattern cuts the text into pretokens: about a word with the blank before it, a number, or
       some punctuation. The models differ in this pattern (PRETOKENISERS).
    2. Each pretoken becomes its UTF-8 bytes, and each byte is a token.
    3. Of all neighbours that the list of merges holds, the pair that comes first in this list is
       joined (the leftmost pair, when the text holds the pair several times). This is repeated
       until the list holds no pair of neighbours.

Files write the bytes of a token in GPT-2's alphabet, where each byte is a character that can be
seen: "Ġthe" is " the". Every id has a fixed string of bytes, as in `fgrlhf.tokenizer`.

Control tokens ("<|im_start|>") are ids that no text is encoded as. The text "<|im_start|>" is
encoded as any other text is: a template puts the ids of control tokens where they belong.

Most vocabularies hold all 256 bytes. SmolLM2's lacks 21, of which U+0004 and the beginning of some
rare characters can occur in a text. As in Hugging Face's tokenizers, these bytes are left out:
`keeps` tells for a text.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path

from fgrlhf.data.fields import UserError, show
from fgrlhf.tokenizer import BLANK, Piece, Vocabulary, character_of_byte, check_text

CACHED, LONGEST_CACHED = 200_000, 64            # pretokens in the cache; characters of such a one

# ----- step 1: pretokens --------------------------------------------------------------------------

# The patterns are for a text in which each character that is not ASCII was replaced by an ASCII
# character of its kind (`Kinds`), because `re` does not know the classes \p{L} and \p{N}. "\s" is
# then a blank, and not one of the four separators U+001C to U+001F, which Python counts as blanks.
GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
SMOLLM = (r"[0-9]|'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+")
LLAMA3 = (r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}"
          r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRETOKENISERS = {name: re.compile(pattern, re.ASCII) for name, pattern in (
    ("gpt2", GPT2), ("smollm", SMOLLM), ("llama3", LLAMA3))}

# Letters and numbers that Unicode 15 and 16 added. Python 3.11 knows those of Unicode 14. With
# these ranges the ids do not depend on the version of Python.
NEW_LETTERS = """
    1C89-1C8A A7CB-A7CD A7DA-A7DC 105C0-105F3 10D4A-10D65 10D6F-10D85 10EC2-10EC4 1123F-11240
    11380-11389 1138B 1138E 11390-113B5 113B7 113D1 113D3 11BC0-11BE0 11F02 11F04-11F10 11F12-11F33
    1342F 13441-13446 13460-143FA 16100-1611D 16D40-16D6C 18CFF 1B132 1B155 1DF25-1DF2A 1E030-1E06D
    1E4D0-1E4EB 1E5D0-1E5ED 1E5F0 2B739 2EBF0-2EE5D 31350-323AF"""
NEW_NUMBERS = """
    10D40-10D49 116D0-116E3 11BF0-11BF9 11F50-11F59 16130-16139 16D70-16D79 1CCF0-1CCF9 1D2C0-1D2D3
    1E4F0-1E4F9 1E5F1-1E5FA"""


class Kinds(dict):
    """A table for str.translate: a letter becomes "a", a number "0", a blank a tab, others "!".

    ASCII stays. "ſ" becomes "S", because Llama 3's contractions ignore case and "ſ" is a form of
    "s". An entry is made when a text first needs it.
    """

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)[0]
        if kind == "C":
            kind = "L" if _within(code, NEW_LETTERS) else "N" if _within(code, NEW_NUMBERS) else "C"
        self[code] = (character if code < 128 else "S" if character == "ſ" else
                      "\t" if character.isspace() else {"L": "a", "N": "0"}.get(kind, "!"))
        return self[code]


def _within(code: int, ranges: str) -> bool:
    return any(int(first, 16) <= code <= int(last or first, 16)
               for first, _, last in (part.partition("-") for part in ranges.split()))


KINDS = Kinds()


def cut(text: str, pretokeniser: str) -> list[str]:
    """Cuts a text into pretokens, which together are the text."""
    pattern = PRETOKENISERS[pretokeniser]
    if text.isascii():
        return pattern.findall(text)
    pretokens, end = [], 0
    for kinds in pattern.findall(text.translate(KINDS)):
        start, end = end, end + len(kinds)
        pretokens.append(text[start:end])
    return pretokens


# ----- step 2: bytes ------------------------------------------------------------------------------

@functools.cache
def alphabet() -> dict[str, int]:
    """Returns GPT-2's alphabet, from a character to its byte.

    The 188 bytes that Latin-1 shows as a character are this character. The others, in order, are
    the characters from U+0100 on: the blank is "Ġ", U+0120.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


@functools.cache
def character_of() -> list[str]:
    """Returns the inverse of `alphabet`: the character of each byte."""
    return sorted(alphabet(), key=alphabet().get)


def to_bytes(token: str) -> bytes:
    """Returns the bytes of a token. A text that is not in the alphabet was added: it is UTF-8."""
    byte_of = alphabet()
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:
        return token.encode()


def from_bytes(data: bytes) -> str:
    """Returns bytes in GPT-2's alphabet."""
    return "".join([character_of()[byte] for byte in data])


# ----- the tokenizer ------------------------------------------------------------------------------

class BPETokenizer(Vocabulary):
    """A byte-level BPE. `fgrlhf/layouts/bpe_files.py` reads one from files and writes its files.

    path: where it was read, for messages. tokens: by id, in GPT-2's alphabet. merges: pairs of
    tokens, or "left right", in the order in which they are joined. pretokeniser: one of
    PRETOKENISERS. control: ids by text of the control tokens, BOS and EOS included.
    takes_whole: whether a pretoken that is a token is taken as it is, without merges; None is True
    for Llama 3's pretokeniser only. adds_bos: False if `encode` never puts BOS first.
    chat_template: the text of the model's own template, which is never executed.

    Other attributes: vocab_size; tokens; merges, each as "left right"; pieces, a list of Piece by
    id; pad_id, a control token that is not EOS, or without one a byte that UTF-8 never has; sha256
    of all that decides an id, so the same tokenizer has the same sha256 in every file format.
    Raises UserError when these do not fit together.
    """

    def __init__(self, path: str | Path, tokens: list[str], merges: Sequence[str | tuple[str, str]],
                 pretokeniser: str, control: dict[str, int], bos_id: int, eos_id: int,
                 adds_bos: bool = True, chat_template: str | None = None,
                 takes_whole: bool | None = None):
        self.path, self.adds_bos, self.chat_template = Path(path), adds_bos, chat_template
        self.vocab_size, self.control, self.pretokeniser = len(tokens), dict(control), pretokeniser
        self.takes_whole = pretokeniser == "llama3" if takes_whole is None else takes_whole
        self.bos_id, self.eos_id = bos_id, eos_id
        self._check(tokens)
        self.tokens, reserved = list(tokens), set(control.values())
        self._bytes = [b"" if id in reserved else to_bytes(text) for id, text in enumerate(tokens)]
        self._id_of = {token: id for id, token in enumerate(tokens) if id not in reserved}
        self._byte_ids = {byte: self._id_of[character] for character, byte in alphabet().items()
                          if character in self._id_of}
        self._read_merges(merges)
        self.pad_id = self._choose_pad()
        self.sha256 = hashlib.sha256(json.dumps([
            pretokeniser, self.takes_whole, adds_bos, bos_id, eos_id, sorted(control.items()),
            tokens, self.merges]).encode()).hexdigest()
        self._cache: dict[str, list[int]] = {}

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """The tokens by id as readable text, in the form that sentencepiece's pieces have.

        A blank is "▁", and a byte that is only a part of a character its number, "\\xe2".
        """
        reserved = set(self.control.values())
        return [Piece(token, 0.0, False) if id in reserved else
                Piece(data.decode(errors="backslashreplace").replace(" ", BLANK), 0.0, True)
                for id, (token, data) in enumerate(zip(self.tokens, self._bytes))]

    def _check(self, tokens: list[str]) -> None:
        """Raises UserError when an id is out of range, or a token occurs twice."""
        if self.pretokeniser not in PRETOKENISERS:
            raise UserError(f"{self.path}: pretokeniser: expected one of "
                            f"{', '.join(PRETOKENISERS)}, got {show(self.pretokeniser)}; choose "
                            "another tokenizer")
        for text, id in [*self.control.items(), ("BOS", self.bos_id), ("EOS", self.eos_id)]:
            if type(id) is not int or not 0 <= id < len(tokens):
                raise damaged(self.path, f"{show(text)}: expected an id below {len(tokens)}, got "
                                         f"{show(id)}")
            if text in self.control and tokens[id] != text:
                raise damaged(self.path, f"token {id}: expected {show(text)}, got "
                                         f"{show(tokens[id])}")
        try:
            "".join(tokens).encode()
        except UnicodeEncodeError:
            raise damaged(self.path, "expected tokens in UTF-8, got half of a surrogate pair"
                          ) from None
        if len(set(tokens)) < len(tokens):
            seen = set()
            twice = next(token for token in tokens if token in seen or seen.add(token))
            raise damaged(self.path, f"expected different tokens, got {show(twice)} twice")

    def _read_merges(self, merges: Sequence[str | tuple[str, str]]) -> None:
        """Keeps for each pair of ids its rank, and for each rank the id of the joined token."""
        id_of, self._ranks, self._joined, self.merges = self._id_of, {}, [], []
        for rank, pair in enumerate(merges):
            try:
                left, right = pair.split(" ") if isinstance(pair, str) else pair
                self._ranks[id_of[left], id_of[right]] = rank
                self._joined.append(id_of[left + right])
            except (KeyError, ValueError, TypeError):
                raise damaged(self.path, f"merge {rank}: expected two tokens that together are a "
                                         f"token, got {show(pair)}") from None
            self.merges.append(f"{left} {right}")

    def _choose_pad(self) -> int:
        """Returns a control token but BOS and EOS, PAD or unknown first; else byte FF; else BOS."""
        free = sorted(id for id in self.control.values() if id != self.eos_id)
        named = [self.control[text] for name in ("pad", "unk") for text in sorted(self.control)
                 if name in text.lower() and self.control[text] != self.eos_id]
        never = self._byte_ids.get(0xFF)                # this byte occurs in no text
        for id in [*named, *(id for id in free if id != self.bos_id), never, *free]:
            if id is not None:
                return id
        raise UserError(f"{self.path}: expected a control token besides EOS, or a token for the "
                        "byte 0xFF, to use as PAD, got neither; choose another tokenizer")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Encodes a text. No part of a text becomes a control token.

        bos, eos: whether to put BOS first (never if `adds_bos` is False) and EOS last.
        Raises UserError for a lone surrogate.
        """
        check_text(text)
        ids = [self.bos_id] * (bos and self.adds_bos)
        for pretoken in cut(text, self.pretokeniser):
            found = self._cache.get(pretoken)
            if found is None:
                found = self._encode_pretoken(pretoken.encode())
                if len(pretoken) <= LONGEST_CACHED:
                    if len(self._cache) >= CACHED:
                        self._cache.clear()
                    self._cache[pretoken] = found
            ids += found
        return ids + [self.eos_id] * eos

    def _encode_pretoken(self, data: bytes) -> list[int]:
        ids = [self._byte_ids[byte] for byte in data if byte in self._byte_ids]
        if self.takes_whole and len(ids) == len(data):
            whole = self._id_of.get(from_bytes(data))
            if whole is not None:
                return [whole]
        return self._merge(ids)

    def _merge(self, ids: list[int]) -> list[int]:
        """Joins neighbours, the pair of the lowest rank first, in n log n steps for n bytes.

        The queue holds a number rank * 2^32 + place for each pair that can be joined. A pair whose
        tokens have changed since is passed over. A token that was joined to the one before it is
        None. One more None at the end has no partner: it is also at place -1, before the first.
        """
        ranks, n = self._ranks, len(ids)
        following, before = list(range(1, n + 2)), list(range(-1, n))
        queue = [ranks[pair] << 32 | place for place, pair in enumerate(pairwise(ids))
                 if pair in ranks]
        heapify(queue)
        ids = [*ids, None]
        while queue:
            rank, place = divmod(heappop(queue), 1 << 32)
            partner = following[place]
            if ranks.get((ids[place], ids[partner])) != rank:
                continue
            ids[place], ids[partner] = self._joined[rank], None
            following[place] = after = following[partner]
            before[after] = place
            for left, right in ((before[place], place), (place, after)):
                if (rank := ranks.get((ids[left], ids[right]))) is not None:
                    heappush(queue, rank << 32 | left)
        return [id for id in ids if id is not None]

    def _surfaces(self, ids):
        return (self._bytes[id] for id in ids)

    def offsets(self, text: str, eos: bool = False) -> list[tuple[int, int]]:
        """Returns, for each id of encode(text, eos=eos), the half-open range of characters of text.

        Ids that share a character all have its range. EOS has an empty range. A character of which
        the vocabulary lacks every byte is in no range.
        """
        data = text.encode()
        kept = [character for character, byte in zip(character_of_byte(data), data)
                if byte in self._byte_ids]
        ranges, end = [], 0                                 # end: bytes so far
        for id in self.encode(text):
            start, end = end, end + len(self._bytes[id])
            ranges.append((kept[start], kept[end - 1] + 1))
        return ranges + [(len(text), len(text))] * eos


def damaged(path: Path, text: str) -> UserError:
    return UserError(f"{path}: {text}; copy the tokenizer's files again")
