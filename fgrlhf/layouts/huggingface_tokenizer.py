"""tokenizer.json and tokenizer_config.json: our sentencepiece model for Hugging Face's tokenizers.

transformers converts a bare tokenizer.model itself, but not to the same ids: 4.57 and 5.23 lose the
blank before " a" and split double blanks otherwise. So the conversion is written down here.

sentencepiece's BPE joins, again and again, the neighbours whose union is the piece of the highest
score. Hugging Face's BPE joins by a list of pairs. The list is therefore every way to cut every
piece in two pieces, in order of the whole piece's score.
"""

from fgrlhf.tokenizer import BLANK, Tokenizer


def merge_list(tokenizer: Tokenizer) -> list[list[str]]:
    """All pairs of pieces that make a piece, the first to be joined first."""
    ids = {piece.text: id for id, piece in enumerate(tokenizer.pieces)}
    merges = []                             # (rank of the union, left id, right id)
    for piece in tokenizer.pieces:
        if not piece.ordinary:              # "<s>" in a text is three characters, never BOS
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in ids and right in ids:
                merges.append((-piece.score, ids[left], ids[right]))
    return [[tokenizer.pieces[left].text, tokenizer.pieces[right].text]
            for _, left, right in sorted(merges)]


def write_tokenizer(tokenizer: Tokenizer) -> dict:
    """tokenizer.json: ids and texts are those of `tokenizer`, but for the character U+2581."""
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
    """tokenizer_config.json for the tokenizer.json beside it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",           # take tokenizer.json as it is
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.pieces[tokenizer.bos_id].text,
        "eos_token": tokenizer.pieces[tokenizer.eos_id].text,
        "unk_token": tokenizer.pieces[tokenizer.pad_id].text,
        "model_max_length": max_seq_len}
