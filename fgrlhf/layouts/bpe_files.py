"""The files of a byte-level BPE: read in the three forms that people have, written in one.

    tokenizer.json             Hugging Face's: vocabulary, merges, pretokeniser, added tokens
    vocab.json + merges.txt    GPT-2's, with GPT-2's pretokeniser
    tokenizer.model            tiktoken's, of Llama 3: a token in base64 and its rank on each line

The files next to them say more (`special_tokens.py`). All added tokens are control tokens here,
as in GGUF: no text is encoded as one. The project writes tokenizer.json and tokenizer_config.json,
from which transformers gives the same ids. (transformers also takes "<|im_end|>" in a text for the
control token, unless it is called with split_special_tokens=True.)

tokenizer.json can describe many kinds of tokenizer. One that would give other ids is refused.
"""

import base64
import re
from pathlib import Path

from fgrlhf.bpe import BPETokenizer, alphabet, damaged, from_bytes
from fgrlhf.data.fields import UserError, check, show
from fgrlhf.data.files import read_bytes, read_object, read_text
from fgrlhf.layouts.kinds import check_kind
from fgrlhf.layouts.special_tokens import SpecialTokens, added_ids

LARGEST = 64 << 20              # bytes of a file; Llama 3's tokenizer.json has 17 million
TIKTOKEN = re.compile(rb"([A-Za-z0-9+/]{1,400}={0,2}) (\d{1,6})")
RANKS = 128_000                 # of Llama 3; other tiktoken files have other pretokenisers

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+")}}
PRETOKENISERS = {"gpt2": [BYTES], "smollm": [DIGITS, BYTES],
                 "llama3": [LLAMA3, BYTES | {"use_regex": False}]}

# The 256 control tokens behind Llama 3's ranks, with the names of Llama 3.1. Llama 3 itself had
# other names for those at 4, 5, 8 and 10, which it did not use.
CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
           "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
           "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
           "<|eot_id|>", "<|python_tag|>"]
CONTROL += [f"<|reserved_special_token_{number}|>" for number in range(3, 248)]


class OtherKind(UserError):
    """A tokenizer of a kind that is not read here."""


def read(path: Path) -> BPETokenizer:
    """Reads tokenizer.json, vocab.json with merges.txt, or tiktoken's file.

    Raises OtherKind for a tokenizer that is not a byte-level BPE with a pretokeniser known here,
    and UserError for a damaged file.
    """
    check_kind(path, "a byte-level BPE: JSON, or a tiktoken vocabulary")
    if (size := path.stat().st_size) > LARGEST:
        raise damaged(path, f"expected at most {LARGEST} bytes, got {size}")
    special = SpecialTokens(path.parent)
    if path.name == "tokenizer.json":
        return _read_json(path, special)
    if path.suffix == ".json":
        return _read_vocab(path, special)
    return _read_tiktoken(path, special)


# ----- tokenizer.json -----------------------------------------------------------------------------

def _read_json(path: Path, special: SpecialTokens) -> BPETokenizer:
    values = read_object(path, "copy the file again")
    model = values.get("model") if isinstance(values.get("model"), dict) else {}
    name = _check_kind(path, values, model)
    vocab, merges = model.get("vocab"), check(list, model.get("merges"), str(path), "merges")
    if not isinstance(vocab, dict):
        raise damaged(path, f"model.vocab: expected an object, got {show(vocab)}")
    added = added_ids(values.get("added_tokens") or [], path)
    whole = check(bool | None, model.get("ignore_merges"), str(path), "model.ignore_merges")
    return _make(path, vocab | added, merges, name, added, special, values.get("post_processor"),
                 bool(whole))


def _check_kind(path: Path, values: dict, model: dict) -> str:
    """Returns the name of the pretokeniser. Raises OtherKind for what would give other ids."""
    nothing = (None, "")
    decoder = values.get("decoder") or {}
    parts = _parts(values.get("pre_tokenizer"))
    names = [name for name, form in PRETOKENISERS.items() if parts == _parts(form)]
    for true, got in (
            (model.get("type", "BPE") != "BPE", f"model.type {show(model.get('type'))}"),
            ("merges" not in model, "a model without merges"),
            (model.get("byte_fallback"), "one that was made from a sentencepiece model; put its "
             "tokenizer.model there, which is then read"),
            (values.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}),
             "a normalizer, which changes the text"),
            (model.get("continuing_subword_prefix") not in nothing, "continuing_subword_prefix"),
            (model.get("end_of_word_suffix") not in nothing, "end_of_word_suffix"),
            (model.get("dropout"), "dropout"),
            (not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel",
             f"decoder {show(decoder)}"),
            (not names, f"pre_tokenizer {show(parts)}")):
        if true:
            action = "" if ";" in got else "; choose a model with another tokenizer"
            raise OtherKind(f"{path}: expected byte-level BPE of GPT-2, SmolLM2 or Llama 3, got "
                            f"{got}{action}")
    return names[0]


def _parts(form: object) -> list:
    """Returns the steps of a pre_tokenizer, without what changes no id."""
    if isinstance(form, list):
        return [part for step in form for part in _parts(step)]
    if not isinstance(form, dict):
        return [form]
    if form.get("type") == "Sequence" and isinstance(form.get("pretokenizers"), list):
        return _parts(form["pretokenizers"])
    default = {"use_regex": True} if form.get("type") == "ByteLevel" else {}
    return [default | {key: value for key, value in form.items() if key != "trim_offsets"}]


def _begins(form: object, bos: str) -> bool:
    """Returns True if `form` is a post_processor that puts BOS before a text, or is True."""
    if not isinstance(form, dict):
        return form is True
    if isinstance(form.get("processors"), list):
        return any(_begins(step, bos) for step in form["processors"])
    single = form.get("single")
    first = single[0] if isinstance(single, list) and single else None
    token = first.get("SpecialToken") if isinstance(first, dict) else None
    return isinstance(token, dict) and token.get("id") == bos


# ----- the other files ----------------------------------------------------------------------------

def _read_vocab(path: Path, special: SpecialTokens) -> BPETokenizer:
    merges = path.with_name("merges.txt")
    check_kind(merges, "the merges that belong to vocab.json, as text")
    if (size := merges.stat().st_size) > LARGEST:
        raise damaged(merges, f"expected at most {LARGEST} bytes, got {size}")
    lines = [line for line in read_text(merges).split("\n") if line.strip()]
    lines = lines[bool(lines) and lines[0].startswith("#version"):]
    return _make(path, read_object(path, "copy the file again") | special.added,
                 [line.removesuffix("\r") for line in lines], "gpt2", special.added, special, False)


def _read_tiktoken(path: Path, special: SpecialTokens) -> BPETokenizer:
    ids = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        found = TIKTOKEN.fullmatch(line)
        if not found or len(found[1]) % 4 or number > RANKS:
            raise damaged(path, f"line {number}: expected one of at most {RANKS} tokens in base64, "
                                f"and its rank, got {show(line)}")
        ids[from_bytes(base64.b64decode(found[1]))] = int(found[2])
    for character, byte in alphabet().items():
        if character not in ids:
            raise damaged(path, f"expected a token for each of the 256 bytes, got none for "
                                f"0x{byte:02X}")
    control = {text: len(ids) + k for k, text in enumerate(CONTROL)}
    if special.named.keys() < {"bos", "eos"}:
        special.named = {"bos": CONTROL[0], "eos": CONTROL[1]} | special.named
    return _make(path, ids | control, merges_of(ids), "llama3", control, special, True)


def merges_of(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """Returns the merges for ranks of tokens, in the order of Hugging Face's and llama.cpp's files.

    tiktoken joins the neighbours whose union is the token of the lowest rank. The list therefore
    holds every way to cut each token into two tokens.
    """
    merges = [(rank, ranks[token[:cut]], ranks[token[cut:]], token, cut)
              for token, rank in ranks.items() for cut in range(1, len(token))
              if token[:cut] in ranks and token[cut:] in ranks]
    return [(token[:cut], token[cut:]) for *_, token, cut in sorted(merges)]


# ----- both ---------------------------------------------------------------------------------------

def _make(path: Path, ids: dict[str, int], merges: list, name: str, added: dict[str, int],
          special: SpecialTokens, begins: object, takes_whole: bool | None = None) -> BPETokenizer:
    """Builds the tokenizer from the ids of all tokens by their text.

    begins: whether prompts begin with BOS, when no settings say it; True, False or a post_processor
    of tokenizer.json.
    """
    tokens = [None] * len(ids)
    for text, id in ids.items():
        if type(id) is not int or not 0 <= id < len(ids) or tokens[id] is not None:
            raise damaged(path, f"token {show(text)}: expected an id of its own below {len(ids)}, "
                                f"got {show(id)}")
        tokens[id] = text
    bos, eos = special.find(path, ids)
    adds_bos = _begins(begins, tokens[bos]) if special.adds_bos is None else special.adds_bos
    control = added | {text: ids[text] for text in special.named.values() if text in ids}
    return BPETokenizer(path, tokens, merges, name, control | {tokens[bos]: bos, tokens[eos]: eos},
                        bos, eos, adds_bos, special.chat_template, takes_whole)


# ----- writing ------------------------------------------------------------------------------------

def write_tokenizer(tokenizer: BPETokenizer) -> dict:
    """Returns tokenizer.json."""
    tokens = tokenizer.tokens
    bos, flags = tokens[tokenizer.bos_id], ("single_word", "lstrip", "rstrip", "normalized")
    begin = [{"SpecialToken": {"id": bos, "type_id": 0}}] * tokenizer.adds_bos
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    form = PRETOKENISERS[tokenizer.pretokeniser]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": id, "content": token} | dict.fromkeys(flags, False) |
                         {"special": True} for token, id in sorted(
                             tokenizer.control.items(), key=lambda item: item[1])],
        "normalizer": None,
        "pre_tokenizer": form[0] if len(form) == 1 else {"type": "Sequence", "pretokenizers": form},
        "post_processor": {
            "type": "TemplateProcessing", "single": [*begin, text], "pair": [*begin, text, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}},
        "decoder": BYTES,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": tokenizer.takes_whole,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": tokenizer.merges}}


def write_tokenizer_config(tokenizer: BPETokenizer, max_seq_len: int) -> dict:
    """Returns tokenizer_config.json, which transformers reads together with tokenizer.json."""
    tokens = tokenizer.tokens
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",           # use tokenizer.json as it is
        "add_bos_token": tokenizer.adds_bos, "add_eos_token": False,
        "clean_up_tokenization_spaces": False, "bos_token": tokens[tokenizer.bos_id],
        "eos_token": tokens[tokenizer.eos_id], "padding_side": "left",
        "model_max_length": max_seq_len}
    if tokenizer.pad_id in tokenizer.control.values():
        values["pad_token"] = tokens[tokenizer.pad_id]
    return values | ({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})
