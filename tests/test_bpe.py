"""Byte-level BPE: pretokens as `tokenizers` cuts them, merges by a slow loop, its files."""

import base64
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from fgrlhf.bpe import PRETOKENISERS, BPETokenizer, alphabet, cut, from_bytes, to_bytes
from fgrlhf.checkpoint import ExportConfig, export, load_model, load_tokenizer, save_model
from fgrlhf.data.fields import UserError
from fgrlhf.layouts import bpe_files
from fgrlhf.tokenizer import train
from tests.test_checkpoint import same, variant
from tests.test_checkpoint_found import refuse

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "pretokens.json").read_text())
TEXTS = [row["text"] for row in FIXTURE]
CORPUS = ("the cat sat on the mat, and the other cat sat on the log. It's 12 o'clock; they'll see "
          "1234 cats!\n\n\tthe the  the   the é é ü 你好 你好\n") * 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ message }}{% endfor %}"


# ----- a small vocabulary, and slow loops that say what is right ----------------------------------

def join_everywhere(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def learn_merges(pretokeniser: str, count: int) -> list[tuple[str, str]]:
    """Joins the most frequent pair of neighbours, `count` times: how such merges are made."""
    words = [[*from_bytes(word.encode())] for word in cut(CORPUS, pretokeniser)]
    merges = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = [join_everywhere(word, merges[-1]) for word in words]
    return merges


def small(pretokeniser: str = "gpt2", count: int = 40, lacking: bytes = b"", **options):
    """A BPETokenizer: three control tokens, the bytes but those `lacking`, merged tokens."""
    lacks = from_bytes(lacking)
    merges = [(a, b) for a, b in learn_merges(pretokeniser, count) if not {*a, *b} & {*lacks}]
    tokens = CONTROL + [c for c in sorted(alphabet()) if c not in lacks]
    tokens += dict.fromkeys(a + b for a, b in merges)
    options = dict(control={text: id for id, text in enumerate(CONTROL)}, bos_id=1, eos_id=2,
                   chat_template=TEMPLATE) | options
    return BPETokenizer("a place", tokens, merges, pretokeniser, **options)


def slow_ids(tokenizer: BPETokenizer, text: str) -> list[int]:
    """Joins, again and again, the leftmost of the pairs that come first in the list of merges."""
    tokens, merges, ids = tokenizer.tokens, [tuple(m.split()) for m in tokenizer.merges], []
    for word in cut(text, tokenizer.pretokeniser):
        word = from_bytes(word.encode())
        symbols = [word] if tokenizer.takes_whole and word in tokens else [*word]
        while True:
            ranks = [(merges.index(pair), at) for at, pair in enumerate(
                zip(symbols, symbols[1:])) if pair in merges]
            if not ranks:
                break
            at = min(ranks)[1]
            symbols[at:at + 2] = [symbols[at] + symbols[at + 1]]
        ids += [tokens.index(symbol) for symbol in symbols if symbol in tokens]
    return ids


# ----- step 1: pretokens --------------------------------------------------------------------------

@pytest.mark.parametrize("name", PRETOKENISERS)
def test_pretokens_equal_those_of_tokenizers(name):
    for row in FIXTURE:
        ends = [0, *row[name]]
        expected = [row["text"][a:b] for a, b in zip(ends, ends[1:])]
        assert cut(row["text"], name) == expected, ascii(row["text"])


def test_pretokens_by_hand():
    text = "I'LL pay  1234€\n\n  now"
    assert cut(text, "gpt2") == ["I", "'", "LL", " pay", " ", " 1234", "€", "\n\n ", " now"]
    assert cut(text, "smollm") == ["I", "'", "LL", " pay", "  ", *"1234", "€", "\n\n ", " now"]
    assert cut(text, "llama3") == ["I", "'LL", " pay", " ", " ", "123", "4", "€\n\n", " ", " now"]


@pytest.mark.parametrize("name", PRETOKENISERS)
def test_pretokens_together_are_the_text(name):
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000),
                                        draw.randrange(128)])) for _ in range(20))
        assert "".join(cut(text, name)) == text


# ----- steps 2 and 3: ids -------------------------------------------------------------------------

def test_the_alphabet_by_hand():
    assert len(alphabet()) == 256 and set(alphabet().values()) == set(range(256))
    assert to_bytes("Ġthe") == b" the" and to_bytes("Ċĉ") == b"\n\t"
    assert to_bytes("Ã©") == "é".encode()
    assert from_bytes(b" a\x00\xff\xad") == "ĠaĀÿŃ"
    assert to_bytes("<a b>") == b"<a b>"                        # a blank is not in the alphabet


def test_merges_by_hand():
    """Rank decides, not length; the leftmost of equal pairs goes first."""
    tokens = [*CONTROL, *sorted(alphabet()), "bc", "ab", "abc", "aa", "aaa"]
    def ids(text, *merges):
        made = BPETokenizer("x", tokens, merges, "gpt2", dict(zip(CONTROL, range(3))), 1, 2)
        return [tokens[id] for id in made.encode(text)]
    assert ids("abc", "b c", "a b", "ab c") == ["a", "bc"]
    assert ids("abc", "a b", "b c", "ab c") == ["abc"]
    assert ids("aaaaa", "a a") == ["aa", "aa", "a"]
    assert ids("aaaaa", "a a", "aa a") == ["aa", "aaa"]


@pytest.mark.parametrize("name", PRETOKENISERS)
def test_encode_equals_a_slow_loop(name):
    tokenizer = small(name)
    draw = random.Random(1)
    words = CORPUS.split(" ") + ["thethe", "catcatsat", "the\u0301", "'ll", "zz"]
    for text in TEXTS + ["".join(draw.choice(words) + draw.choice(["", " ", "  ", "\n"])
                                 for _ in range(8)) for _ in range(100)]:
        assert tokenizer.encode(text) == slow_ids(tokenizer, text), ascii(text)


def test_a_pretoken_that_is_a_token_is_taken_whole_where_the_model_wants_it():
    tokens = [*CONTROL, *sorted(alphabet()), "ab", "abc", "bc"]
    def ids(text, **options):
        made = BPETokenizer("x", tokens, [("b", "c")], "llama3", dict(zip(CONTROL, range(3))), 1, 2,
                            **options)
        return [tokens[id] for id in made.encode(text)]
    assert ids("abc") == ["abc"] and ids("abcbc") == ["a", "bc", "bc"]
    assert ids("abc", takes_whole=False) == ["a", "bc"]


def test_a_long_pretoken_takes_no_quadratic_time():
    tokenizer, started = small(), time.perf_counter()
    for text in ("the" * 40_000, " " * 120_000, "é" * 60_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - started < 30                   # about 2 s; quadratic: hours


# ----- text and back ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PRETOKENISERS)
def test_every_text_round_trips_in_all_three_ways(name):
    tokenizer = small(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.keeps(text)
        assert "".join(tokenizer.stream(iter(ids))) == text
        spans = tokenizer.spans(ids)
        assert tokenizer.offsets(text) == spans
        assert tokenizer.offsets(text, eos=True) == spans + [(len(text), len(text))]
        for id, (start, end) in zip(ids, spans):
            assert tokenizer._bytes[id] in text[start:end].encode()


def test_every_byte_has_an_id_that_decodes_to_it():
    tokenizer = small()
    for byte in range(256):
        id = len(CONTROL) + sorted(alphabet()).index(from_bytes(bytes([byte])))
        assert tokenizer.decode([id]) == bytes([byte]).decode(errors="replace")
    face = tokenizer.encode("😀")
    assert [tokenizer.decode(face[:n]) for n in range(5)] == ["", *["\ufffd"] * 3, "😀"]
    assert list(tokenizer.stream(iter(face))) == ["😀"]


def test_bos_eos_and_pad():
    tokenizer = small()
    ids = tokenizer.encode("the cat")
    assert tokenizer.encode("the cat", bos=True, eos=True) == [1, *ids, 2]
    assert small(adds_bos=False).encode("the cat", bos=True) == ids
    assert tokenizer.decode([1, 0, *ids, 2]) == "the cat"
    assert tokenizer.spans([1, *ids[:1]]) == [(0, 0), (0, len(tokenizer.decode(ids[:1])))]
    assert tokenizer.pad_id == 0                                # neither BOS nor EOS
    for only in (small(bos_id=0, control={t: i for i, t in enumerate(CONTROL) if i != 1}),
                 small(bos_id=2, control={"<|im_end|>": 2})):   # GPT-2: BOS is EOS
        assert only.tokens[only.pad_id] == from_bytes(b"\xff")


def test_control_text_in_a_text_stays_characters():
    tokenizer = small("smollm")
    text = "<|im_start|>user\nhi<|im_end|>"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.control.values()) and tokenizer.decode(ids) == text
    assert tokenizer.control == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def test_bytes_that_the_vocabulary_lacks_are_left_out():
    """SmolLM2 lacks U+0004 and the first byte of some rare characters."""
    tokenizer = small("smollm", lacking=b"\x04\xf1")
    text = "the\x04 cat\U00040000s"
    assert not tokenizer.keeps(text) and tokenizer.keeps("the cat")
    assert tokenizer.decode(tokenizer.encode(text)) == "the cat\ufffd\ufffd\ufffds"
    ids, ranges = tokenizer.encode(text), tokenizer.offsets(text, eos=True)
    assert len(ranges) == len(ids) + 1
    assert [text[a:b] for a, b in ranges[-5:]] == ["\U00040000"] * 3 + ["s", ""]
    assert ranges[0] == (0, 3)


def test_encode_refuses_a_lone_surrogate():
    with pytest.raises(UserError, match="character 2 is a lone surrogate"):
        small().encode("ab\ud800")


# ----- files --------------------------------------------------------------------------------------

def write_json(folder: Path, **files: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def write_folder(folder: Path, tokenizer: BPETokenizer) -> Path:
    return write_json(folder, tokenizer=bpe_files.write_tokenizer(tokenizer),
                      tokenizer_config=bpe_files.write_tokenizer_config(tokenizer, 40))


@pytest.mark.parametrize("name", PRETOKENISERS)
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_model_folder_keeps_the_tokenizer(name, layout, tmp_path):
    tokenizer = small(name, adds_bos=name == "llama3")
    model = variant(vocab_size=tokenizer.vocab_size + 3)
    save_model(model, tmp_path / "m", layout, tokenizer)
    found = load_tokenizer(tmp_path / "m")
    assert [found.encode(text, bos=True) for text in TEXTS] == [
        tokenizer.encode(text, bos=True) for text in TEXTS]
    for key in ("sha256", "vocab_size", "bos_id", "eos_id", "pad_id", "control", "chat_template",
                "adds_bos", "takes_whole"):
        assert getattr(found, key) == getattr(tokenizer, key), key
    assert load_model(tmp_path / "m").config.vocab_size == tokenizer.vocab_size
    other = "meta" if layout == "hf" else "hf"
    export(ExportConfig(model=str(tmp_path / "m"), out=str(tmp_path / "n"), layout=other))
    assert load_tokenizer(tmp_path / "n").sha256 == tokenizer.sha256
    assert same(load_model(tmp_path / "n"), load_model(tmp_path / "m"))


def test_sha256_tells_tokenizers_apart():
    shas = [made.sha256 for made in (
        small(), small("smollm"), small(count=39), small(adds_bos=False), small(eos_id=0),
        small(takes_whole=True), small(control={"<|im_start|>": 1, "<|im_end|>": 2}))]
    assert len(set(shas)) == len(shas)
    assert small(chat_template=None).sha256 == small().sha256    # a template decides no id


def test_gpt2s_files_give_the_same_tokenizer(tmp_path):
    tokenizer = small(adds_bos=False)
    vocab = {token: id for id, token in enumerate(tokenizer.tokens) if id > 2}
    folder = write_json(
        tmp_path, vocab=vocab, added_tokens={"<|endoftext|>": 0},
        special_tokens_map={"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}},
        tokenizer_config={"added_tokens_decoder": {
            "1": {"content": "<|im_start|>", "special": True}, "2": {"content": "<|im_end|>"}}})
    for start, end in (("#version: 0.2\n", "\n"), ("", "\r\n")):
        (folder / "merges.txt").write_text(start + "".join(
            merge + end for merge in tokenizer.merges), newline="")
        assert load_tokenizer(folder).sha256 == tokenizer.sha256


def tiktoken_lines(ranks: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))


def by_joined_rank(word: bytes, ranks: list[bytes]) -> list[int]:
    """tiktoken's rule: joins the leftmost pair of neighbours whose union has the lowest rank."""
    if word in ranks:
        return [ranks.index(word)]
    parts = [word[at:at + 1] for at in range(len(word))]
    while True:
        found = [(ranks.index(a + b), at) for at, (a, b) in enumerate(zip(parts, parts[1:]))
                 if a + b in ranks]
        if not found:
            return [ranks.index(part) for part in parts]
        at = min(found)[1]
        parts[at:at + 2] = [parts[at] + parts[at + 1]]


def test_tiktokens_file(tmp_path):
    """Also a token that no merge of two tokens makes ("then"), which is only taken whole."""
    learned = [to_bytes(a + b) for a, b in learn_merges("llama3", 40)]
    ranks = list(dict.fromkeys([*(bytes([b]) for b in range(256)), *learned, b" then", b"  ",
                                b"   "]))
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_lines(ranks))
    tokenizer = load_tokenizer(tmp_path)
    n = len(ranks)
    assert (tokenizer.vocab_size, tokenizer.adds_bos) == (n + 256, True)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (n, n + 1, n + 4)
    names = {text: id - n for text, id in tokenizer.control.items()}
    assert [names[f"<|{text}|>"] for text in (
        "begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id",
        "reserved_special_token_247")] == [0, 1, 6, 7, 9, 255]
    for text in [*TEXTS, CORPUS, "then then  then", " " * 9 + "x"]:
        expected = [id for word in cut(text, "llama3")
                    for id in by_joined_rank(word.encode(), ranks)]
        assert tokenizer.encode(text) == expected, ascii(text)
    write_json(tmp_path, generation_config={"eos_token_id": [n + 1, n + 9]},
               tokenizer_config={"eos_token": "<|eot_id|>"})
    assert load_tokenizer(tmp_path).eos_id == n + 9


def test_the_kind_of_a_tokenizer_is_recognised_by_the_files(tmp_path):
    pieces = train(["hello world"] * 3, 270, tmp_path / "a" / "tokenizer.model")
    bpe = write_folder(tmp_path / "a", small())
    assert load_tokenizer(bpe).sha256 == pieces.sha256          # sentencepiece's own comes first
    (bpe / "tokenizer.model").write_bytes(tiktoken_lines([bytes([b]) for b in range(256)]))
    assert load_tokenizer(bpe).sha256 == small().sha256         # tokenizer.json says more
    (bpe / "tokenizer.json").unlink()
    (bpe / "tokenizer_config.json").unlink()
    assert load_tokenizer(bpe).vocab_size == 512
    with pytest.raises(UserError, match="already holds tokenizer.model, of another tokenizer"):
        save_model(variant(vocab_size=small().vocab_size), bpe, tokenizer=small())
    assert [path.name for path in bpe.iterdir()] == ["tokenizer.model"]


def test_where_bos_eos_and_the_template_are_found(tmp_path):
    tokenizer = small()
    def found(folder, **files):
        values = json.loads(json.dumps(bpe_files.write_tokenizer(tokenizer)))
        if files.pop("without_bos", False):
            values["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}]}
        return load_tokenizer(write_json(tmp_path / folder, tokenizer=values, **files))
    one = found("1", config={"bos_token_id": 1, "eos_token_id": [2, 0]})
    assert (one.bos_id, one.eos_id, one.adds_bos, one.chat_template) == (1, 2, True, None)
    two = found("2", without_bos=True, special_tokens_map={"bos_token": "<|im_start|>"},
                tokenizer_config={"eos_token": "<|endoftext|>", "chat_template": [
                    {"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]})
    assert (two.bos_id, two.eos_id, two.adds_bos, two.chat_template) == (1, 0, False, "yes")
    three = found("3", tokenizer_config={"eos_token": "<|im_end|>", "add_bos_token": True})
    assert (three.bos_id, three.eos_id, three.adds_bos) == (2, 2, False)    # no BOS at all
    (tmp_path / "1" / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(tmp_path / "1").chat_template == TEMPLATE
    refuse(lambda: found("4"), "EOS: expected one of its", "give eos_token in tokenizer_config")


LLAMA2 = {"byte_fallback": True}
FAULTS = [
    (["model"], LLAMA2, "put its tokenizer.model there"), (["model", "type"], "Unigram", "Unigram"),
    (["normalizer"], {"type": "NFC"}, "a normalizer, which changes the text"),
    (["pre_tokenizer"], {"type": "Metaspace"}, "pre_tokenizer"),
    (["pre_tokenizer"], None, "pre_tokenizer"),
    (["pre_tokenizer", "add_prefix_space"], True, "add_prefix_space"),
    (["decoder"], {"type": "WordPiece"}, "decoder"),
    (["model", "merges"], ["a b c"], "merge 0: expected two tokens that together are a token"),
    (["model", "merges"], [5], "merge 0"), (["model", "merges"], [["a", ["b"]]], "merge 0"),
    (["model", "merges"], ["< <|im_end|>"], "merge 0"), (["model", "merges"], {}, "merges"),
    (["model", "vocab"], {"a": 0, "b": 0}, "expected an id of its own"),
    (["model", "vocab"], {"a": -1}, "expected an id of its own"),
    (["model", "vocab"], {"a": 10**400}, "expected an id of its own"),
    (["added_tokens"], [{"id": 0, "content": "\ud800"}], "expected an id"),
    (["model", "vocab"], [], "model.vocab"),
    (["added_tokens"], [{"id": 2.5, "content": "x"}], "added_tokens: expected an id and a text"),
    (["added_tokens"], [{"id": 0, "content": "x"}], "expected an id of its own")]


@pytest.mark.parametrize("keys, value, reason", FAULTS)
def test_a_tokenizer_json_of_another_kind_or_damaged_is_refused(keys, value, reason, tmp_path):
    folder = write_folder(tmp_path, small())
    values = json.loads((folder / "tokenizer.json").read_text())
    place = values
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = place[keys[-1]] | value if value is LLAMA2 else value
    write_json(folder, tokenizer=values)
    refuse(lambda: load_tokenizer(folder), "tokenizer.json: ", reason)


def test_a_normalizer_without_steps_changes_nothing(tmp_path):
    values = json.loads(json.dumps(bpe_files.write_tokenizer(small())))
    values["normalizer"] = {"type": "Sequence", "normalizers": []}
    folder = write_json(write_folder(tmp_path, small()), tokenizer=values)
    assert load_tokenizer(folder).sha256 == small().sha256


def test_damaged_files_of_the_other_forms_are_refused(tmp_path):
    file = tmp_path / "tokenizer.model"
    good = tiktoken_lines([bytes([b]) for b in range(256)])
    for data, reason in ((good[:-8] + b"\xff\n", "line 256: expected one of at most 128000"),
                         (good + b"YWI= 0\n", "expected an id of its own below"),
                         (good + b"YWI 256\n", "line 257"), (good[7:], "got none for 0x00")):
        file.write_bytes(data)
        refuse(lambda: load_tokenizer(tmp_path), "tokenizer.model: ", reason)
    file.unlink()
    write_json(tmp_path, vocab={"a": 0, "<e>": 1}, tokenizer_config={"eos_token": "<e>"})
    refuse(lambda: load_tokenizer(tmp_path), "merges.txt: expected the merges that belong")
    (tmp_path / "merges.txt").write_text("a b\n")
    refuse(lambda: load_tokenizer(tmp_path), "merge 0: expected two tokens that together are")


def test_another_kind_of_tokenizer_does_not_stop_the_model(tmp_path):
    save_model(variant(), tmp_path)
    write_json(tmp_path, tokenizer={"model": {"type": "Unigram"}})
    assert same(load_model(tmp_path), variant())
    refuse(lambda: load_tokenizer(tmp_path), "expected byte-level BPE of GPT-2, SmolLM2 or Llama 3")


# ----- sentencepiece: the same attributes ---------------------------------------------------------

def test_control_and_chat_template_of_a_sentencepiece_model(tmp_path):
    pieces = train(["hello world"] * 3, 272, tmp_path / "t" / "tokenizer.model")
    assert pieces.control == {"<s>": 1, "</s>": 2} and pieces.chat_template is None
    write_json(tmp_path / "t", tokenizer_config={"chat_template": TEMPLATE})
    pieces = load_tokenizer(tmp_path / "t")
    assert pieces.chat_template == TEMPLATE and pieces.adds_bos
    for layout in ("meta", "hf"):
        save_model(variant(), tmp_path / layout, layout, pieces)
        assert load_tokenizer(tmp_path / layout).chat_template == TEMPLATE


# ----- against tokenizers -------------------------------------------------------------------------

@pytest.mark.parametrize("name", PRETOKENISERS)
def test_ids_equal_those_of_tokenizers(name, tmp_path):
    theirs = pytest.importorskip("tokenizers", reason="compares with tokenizers where it is "
                                 "installed")
    tokenizer = small(name)
    file = write_folder(tmp_path, tokenizer) / "tokenizer.json"
    other = theirs.Tokenizer.from_file(str(file))
    other.encode_special_tokens = True                          # "<|im_start|>" is characters
    for text in [*TEXTS, CORPUS]:
        assert other.encode(text).ids == tokenizer.encode(text, bos=True), ascii(text)
    other.encode_special_tokens = False
    assert other.encode("<|im_start|>the cat<|im_end|>").ids == [
        1, 1, *tokenizer.encode("the cat"), 2]
