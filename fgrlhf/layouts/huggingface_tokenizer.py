"""tokenizer.json and tokenizer_config.json: a sentencepiece model for Hugging Face's tokenizers.

transformers converts a tokenizer.model by itself, but the ids differ: 4.57 and 5.23 lose the blank
before " a" and split double blanks differently. The conversion is therefore done here, and gives
the ids of `Tokenizer.encode` for every text.

sentencepiece's BPE repeatedly joins the two neighbours whose union is the piece with the highest
score. Hugging Face's BPE joins pairs in the order of a list. The list therefore holds every way to
cut every piece into two pieces, in the order of the score of the whole piece. In LLaMA's tokenizer
the runs of 2 to 16 blanks have the same score. sentencepiece then joins the leftmost pair, so a run
grows from the left: for the same score, the pair with the longer left piece comes first.

Two things keep text from becoming something else. A blank is written as a blank, not as "▁", so
that the character "▁" in a text is encoded by its bytes. And no control piece is a special token
of the text ("split_special_tokens"): "</s>" in a text is four characters, not EOS.

sentencepiece can do more than that. A model that does is refused, because its ids would differ.
"""

from collections.abc import Iterable, Iterator

from fgrlhf.data.fields import UserError
from fgrlhf.tokenizer import BLANK, Piece, Tokenizer

BPE, NORMAL, USER_DEFINED, UNUSED = 2, 1, 4, 5         # numbers of sentencepiece's protocol buffers


def write_tokenizer(tokenizer: Tokenizer) -> dict:
    """Returns tokenizer.json. Raises UserError when it could not give the ids of `tokenizer`."""
    _check_exact(tokenizer)
    bos = tokenizer.pieces[tokenizer.bos_id].text
    begin = [{"SpecialToken": {"id": bos, "type_id": 0}}] * tokenizer.adds_bos
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    prepend, strip = None, []
    if tokenizer.adds_blank:
        prepend = {"type": "Prepend", "prepend": " "}
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0", "added_tokens": [], "normalizer": prepend, "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [*begin, text], "pair": [*begin, text, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}},
        "decoder": {"type": "Sequence",
                    "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}] + strip},
        "model": {
            "type": "BPE", "unk_token": tokenizer.pieces[tokenizer.pad_id].text, "fuse_unk": True,
            "byte_fallback": True, "dropout": None, "ignore_merges": False,
            "vocab": {_plain(piece.text): id for id, piece in enumerate(tokenizer.pieces)},
            "merges": merge_list(tokenizer)}}


def merge_list(tokenizer: Tokenizer) -> list[list[str]]:
    """Lists all pairs of pieces that make a piece, in the order in which they are joined."""
    ids = {piece.text: id for id, piece in enumerate(tokenizer.pieces) if piece.ordinary}
    merges = []                             # (rank of the union, -length of left, left, right)
    for text in ids:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                merges.append((-tokenizer.pieces[ids[text]].score, -cut, _plain(left),
                               _plain(right)))
    return [[left, right] for _, _, left, right in sorted(merges)]


def _plain(piece: str) -> str:
    return piece.replace(BLANK, " ")


def write_tokenizer_config(tokenizer: Tokenizer, max_seq_len: int) -> dict:
    """Returns tokenizer_config.json, which transformers reads together with tokenizer.json."""
    unknown = tokenizer.pieces[tokenizer.pad_id].text
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",           # use tokenizer.json as it is
        "add_bos_token": tokenizer.adds_bos, "add_eos_token": False,
        "clean_up_tokenization_spaces": False, "split_special_tokens": True,
        "bos_token": tokenizer.pieces[tokenizer.bos_id].text,
        "eos_token": tokenizer.pieces[tokenizer.eos_id].text,
        "unk_token": unknown, "pad_token": unknown, "padding_side": "left",
        "model_max_length": max_seq_len}


# ----- what cannot be written ---------------------------------------------------------------------

def _check_exact(tokenizer: Tokenizer) -> None:
    """Raises UserError for a model whose ids depend on more than the merges of its pieces."""
    model = list(fields(tokenizer.model))
    entries = [dict(fields(value)) for number, value in model if number == 1]
    trainer, normaliser = ({key: value for number, message in model if number == wanted
                            for key, value in fields(message)} for wanted in (2, 3))
    kinds = {entry.get(3, NORMAL) for entry in entries}
    pieces = {piece.text: piece for piece in tokenizer.pieces if piece.ordinary}
    for true, reason in (
            (trainer.get(3) != BPE, "it is not BPE (unigram, word or char)"),
            (USER_DEFINED in kinds, "it has user-defined symbols"),
            (UNUSED in kinds, "it has unused pieces"),
            (bool(normaliser.get(2)), "it normalises text"),
            (normaliser.get(4, 1), "it removes extra blanks"),
            (not normaliser.get(5, 1), "it does not escape blanks"),
            (trainer.get(24, 0), "its pieces end in their blanks"),
            (not trainer.get(35), "it has no byte pieces"),
            (_has_ties(pieces.values()), "two of its pieces have the same score"),
            (any(c not in pieces for text in pieces for c in text), "a character of a piece is no "
             "piece")):
        if true:
            raise UserError(f"{tokenizer.path}: expected a tokenizer of LLaMA's kind, which can be "
                            f"written as tokenizer.json, got another: {reason}; export without the "
                            "tokenizer (--no-tokenizer)")


def _has_ties(pieces: Iterable[Piece]) -> bool:
    """Tells whether a text may have two joins of the same score, and their order matters.

    It does not matter in runs of a character, when each length from 2 to the longest is a piece.
    """
    lengths = {}                            # by score and character; "" for what is not a run
    for text, score in ((piece.text, piece.score) for piece in pieces if len(piece.text) > 1):
        run = text[0] if set(text) == {text[0]} else ""
        lengths.setdefault(score, {}).setdefault(run, []).append(len(text))
    return any(sum(map(len, runs.values())) > 1 and
               ("" in runs or any(max(found) != len(found) + 1 for found in runs.values()))
               for runs in lengths.values())


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) for each field of a protocol buffer.

    A value is an integer, or the bytes of a text, of a message or of a float. In sentencepiece's
    model: 1 a piece (1 text, 2 score, 3 kind), 2 the trainer, 3 the normaliser.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if key & 7 == 2 else {1: 8, 5: 4}.get(key & 7, 0)
        yield key >> 3, message[at:at + size]
        at += size
