"""tokenizer.json and tokenizer_config.json: a sentencepiece model for Hugging Face's tokenizers.

transformers converts a tokenizer.model by itself, but the ids differ: 4.57 and 5.23 lose the blank
before " a" and split double blanks differently. The conversion is therefore done here.

sentencepiece's BPE repeatedly joins the two neighbours whose union is the piece with the highest
score. Hugging Face's BPE joins pairs in the order of a list. The list therefore holds every way to
cut every piece into two pieces, in the order of the score of the whole piece.
"""

from fgrlhf.tokenizer import BLANK, Tokenizer


def merge_list(tokenizer: Tokenizer) -> list[list[str]]:
    """Lists all pairs of pieces that make a piece, in the order in which they are joined."""
    ids = {piece.text: id for id, piece in enumerate(tokenizer.pieces)}
    merges = []                             # (rank of the union, left id, right id)
    for piece in tokenizer.pieces:
        if not piece.ordinary:              # "<s>" in a text is three characters, not BOS
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in ids and right in ids:
                merges.append((-piece.score, ids[left], ids[right]))
    return [[tokenizer.pieces[left].text, tokenizer.pieces[right].text]
            for _, left, right in sorted(merges)]


def write_tokenizer(tokenizer: Tokenizer) -> dict:
    """Returns tokenizer.json. It gives the ids of `tokenizer` for all text without U+2581."""
    def special(id: int) -> dict:
        return {"id": id, "content": tokenizer.pieces[id].text, "special": True,
                "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}

    bos = tokenizer.pieces[tokenizer.bos_id].text
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    prepend, strip = [], []
    if tokenizer.adds_blank:
        prepend = [{"type": "Prepend", "prepend": BLANK}]
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "added_tokens": [special(id) for id in
                         sorted({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id})],
        "normalizer": {"type": "Sequence", "normalizers": prepend + [
            {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}] + strip},
        "model": {
            "type": "BPE", "unk_token": tokenizer.pieces[tokenizer.pad_id].text, "fuse_unk": True,
            "byte_fallback": True, "dropout": None, "ignore_merges": False,
            "vocab": {piece.text: id for id, piece in enumerate(tokenizer.pieces)},
            "merges": merge_list(tokenizer)}}


def write_tokenizer_config(tokenizer: Tokenizer, max_seq_len: int) -> dict:
    """Returns tokenizer_config.json, which transformers reads together with tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",           # use tokenizer.json as it is
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.pieces[tokenizer.bos_id].text,
        "eos_token": tokenizer.pieces[tokenizer.eos_id].text,
        "unk_token": tokenizer.pieces[tokenizer.pad_id].text,
        "model_max_length": max_seq_len}
