"""The tokenizer against sentencepiece itself, with LLaMA's model and with one trained here."""

import random
import unicodedata

import pytest
import sentencepiece

from fgrlhf.data.fields import UserError
from fgrlhf.tokenizer import Tokenizer, train

CORPUS = ["the cat sat on the mat. the dog sat on the log.", "12 cats and 34 dogs\nsat and sat.",
          "  the mat, the log, the cat"] * 4

# Pieces of LLaMA's vocabulary, read from the model file by hand: 29871 "▁", 263 "▁a", 259 "▁▁",
# 13 <0x0A>, 12 <0x09>, byte b = b + 3.
HARD_CASES = {
    "": [],
    "a": [263],
    " a": [29871, 263],
    "  a ": [259, 263, 29871],
    "\n\na": [29871, 13, 13, 29874],
    "a\tb": [263, 12, 29890],
    "é": [904],
    "e\u0301": [321, 30103],                                  # combining acute accent
    "😀": [29871, 0xF0 + 3, 0x9F + 3, 0x98 + 3, 0x80 + 3],      # no such piece: byte fallback
    "\x00": [29871, 3],
    "你好": [29871, 30919, 31076],
    "\u3000a": [29871, 30358, 29874],                         # ideographic blank is not normalised
    "\u00a0x": [20246, 29916],
    "<s>": [529, 29879, 29958],                               # text that looks like a control piece
    "a▁b": [263, 0xE2 + 3, 0x96 + 3, 0x81 + 3, 29890],          # U+2581 itself
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    return train(CORPUS, 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def llama(data_dir) -> Tokenizer:
    return Tokenizer(data_dir / "llama_tokenizer" / "tokenizer.model")


def lossy(folder, **options) -> Tokenizer:
    """A tokenizer of sentencepiece's defaults: it collapses blanks, normalises characters."""
    words = "the river and bank stone is red green blue one half tree bird".split()
    draw = random.Random(0)
    lines = [" ".join(draw.choice(words) for _ in range(12)) + "." for _ in range(500)]
    options = dict(vocab_size=320, model_type="bpe", byte_fallback=True) | options
    with open(folder / "lossy.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file,
                                                 minloglevel=2, **options)
    return Tokenizer(folder / "lossy.model")


def random_text(generator: random.Random) -> str:
    scalar = generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)])
    parts = ["a", " ", "  ", "\n", "\t", "é", "e\u0301", "😀", "👩\u200d🚀", "你", "▁", "the ", "\x00",
             "\U0010FFFD", chr(scalar)]
    return "".join(generator.choice(parts) for _ in range(generator.randrange(12)))


def test_encode_equals_the_table_of_hard_cases(llama):
    assert {text: llama.encode(text) for text in HARD_CASES} == HARD_CASES


def test_encode_equals_sentencepiece(llama):
    own = sentencepiece.SentencePieceProcessor(model_file=str(llama.path))
    generator = random.Random(1)
    for _ in range(1000):
        text = random_text(generator).replace("▁", "_")
        assert llama.encode(text) == own.encode(text)
        assert llama.encode(text, bos=True, eos=True) == [1] + own.encode(text) + [2]


def test_encode_round_trips_any_text(small):
    generator = random.Random(2)
    for _ in range(1000):
        text = random_text(generator)
        assert small.decode(small.encode(text)) == text
        assert small.decode(small.encode(text, bos=True, eos=True)) == text


def test_encode_round_trips_any_text_with_llamas_model(llama):
    generator = random.Random(3)
    for text in [random_text(generator) for _ in range(1000)] + list(HARD_CASES):
        assert llama.decode(llama.encode(text)) == text


def test_encode_refuses_a_lone_surrogate(small):
    with pytest.raises(UserError, match="character 2 is a lone surrogate"):
        small.encode("ab\ud800")


def test_decode_equals_sentencepiece_on_random_ids(llama):
    own = sentencepiece.SentencePieceProcessor(model_file=str(llama.path))
    generator, compared = random.Random(4), 0
    for _ in range(2000):
        ids = [generator.randrange(3) if generator.random() < .2 else generator.randrange(32000)
               for _ in range(generator.randrange(8))]
        if "\ufffd" not in (text := llama.decode(ids)):       # broken UTF-8: see the next test
            assert text == own.decode(ids)
            compared += 1
    assert compared > 1500


def test_decode_marks_broken_utf8(small):
    face = [b + 3 for b in "😀".encode()]
    assert small.decode(face) == "😀"
    assert small.decode(face[:3]) == "\ufffd"
    assert small.decode(face[:2] + small.encode("a")) == "\ufffd a"


def test_stream_joins_to_decode_and_never_breaks_a_character(small):
    generator = random.Random(5)
    for _ in range(500):
        text = random_text(generator)
        parts = list(small.stream(iter(small.encode(text))))
        assert "".join(parts) == text                         # a broken character would be U+FFFD
        ids = [generator.randrange(small.vocab_size) for _ in range(8)]
        assert "".join(small.stream(ids)) == small.decode(ids)


def test_stream_gives_each_character_as_soon_as_it_is_complete(small):
    ids = [b + 3 for b in "é".encode()] + small.encode("a")
    taken = []

    def source():
        for id in ids:
            taken.append(id)
            yield id

    stream = small.stream(source())
    assert next(stream) == "é" and len(taken) == 2
    assert "".join(stream) == " a"


def test_spans_by_hand(llama):
    ids = llama.encode("a😀  b", bos=True, eos=True)           # <s> ▁a F0 9F 98 80 ▁ ▁b </s>
    assert llama.spans(ids) == [(0, 0), (0, 1), *4 * [(1, 2)], (2, 3), (3, 5), (5, 5)]
    assert llama.spans(llama.encode("😀"))[0] == (0, 0)        # the blank that encoding added


def test_spans_cover_the_text_in_order(small):
    generator = random.Random(6)
    for _ in range(500):
        text = random_text(generator)
        ids = small.encode(text)
        spans = small.spans(ids)
        assert len(spans) == len(ids)
        assert spans == sorted(spans)
        covered = {k for start, end in spans for k in range(start, end)}
        assert covered == set(range(len(text)))


def test_spans_of_broken_utf8_stay_inside_the_text(small):
    generator = random.Random(7)
    for _ in range(500):
        ids = [generator.randrange(259) for _ in range(10)]
        text = small.decode(ids)
        assert all(0 <= start <= end <= len(text) for start, end in small.spans(ids))


def test_spans_of_bytes_that_spell_a_surrogate_give_each_its_own_character(small):
    """ED A0 80 would be U+D800. It gives three characters U+FFFD, one for each byte."""
    ids = [byte + 3 for byte in (0xED, 0xA0, 0x80)] + small.encode("a")[-1:]
    assert small.decode(ids) == 3 * "\ufffd" + "a"
    assert small.spans(ids) == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("options", [
    {}, {"treat_whitespace_as_suffix": True}, {"add_dummy_prefix": False},
    {"model_type": "unigram", "normalization_rule_name": "nfkc_cf", "hard_vocab_limit": False},
    {"remove_extra_whitespaces": False}, {"normalization_rule_name": "identity"},
    {"byte_fallback": False, "vocab_size": 60}], ids=str)
def test_offsets_follow_each_id_through_the_normaliser(options, tmp_path):
    """The characters of an id, normalised on their own, contain the text of its piece."""
    tokenizer, draw = lossy(tmp_path, **options), random.Random(1)
    parts = ["the", "red", "river", " ", "  ", "\n", "\t", "½", "ｆ", "ﬁ", "é", "▁", "漢", "Stone"]
    changed = 0
    for _ in range(200):
        text = "".join(draw.choice(parts) for _ in range(draw.randrange(12)))
        ids, offsets = tokenizer.encode(text), tokenizer.offsets(text, eos=True)
        assert len(offsets) == len(ids) + 1 and offsets[-1] == (len(text), len(text))
        assert offsets == sorted(offsets)
        for id, (start, end) in zip(ids, offsets):
            piece = tokenizer.pieces[id]
            assert 0 <= start <= end <= len(text)
            if piece.ordinary and (own := piece.text.strip("▁")):
                source = unicodedata.normalize("NFKC", text[start:end])
                if options.get("normalization_rule_name") == "nfkc_cf":
                    source = source.casefold()
                if options.get("normalization_rule_name") == "identity":
                    source = text[start:end]
                assert own in source
        covered = {t for start, end in offsets for t in range(start, end)}
        assert all(t in covered for t, c in enumerate(text) if not c.isspace() and c != "▁")
        changed += not tokenizer.keeps(text)
        assert not tokenizer.keeps(text) or offsets[:-1] == tokenizer.spans(ids)
    assert changed > 20


def test_offsets_of_a_tokenizer_that_keeps_text_are_spans(small):
    draw = random.Random(2)
    for text in (random_text(draw) for _ in range(300)):
        assert small.keeps(text)
        assert small.offsets(text, eos=True) == small.spans(small.encode(text, eos=True))


def test_special_ids(llama):
    assert (llama.vocab_size, llama.bos_id, llama.eos_id, llama.pad_id) == (32000, 1, 2, 0)
    assert llama.sha256 == "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"


def test_train_gives_the_exact_size_and_the_same_file_each_time(small, tmp_path):
    again = train(CORPUS, 300, tmp_path / "again.model")
    assert small.vocab_size == again.vocab_size == 300
    assert small.sha256 == again.sha256
    assert (small.bos_id, small.eos_id, small.pad_id) == (1, 2, 0)


def test_train_splits_digits_and_keeps_newlines_as_bytes(small):
    assert [small.decode([id]) for id in small.encode("12\n34")[-5:]] == ["1", "2", "\n", "3", "4"]


@pytest.mark.parametrize("size, message", [(100, "need 27[0-9]"), (5000, "at most [34][0-9][0-9]")])
def test_train_names_the_reachable_size(size, message, tmp_path):
    with pytest.raises(UserError, match=f"vocabulary: expected {size} pieces, got.*{message}"):
        train(CORPUS, size, tmp_path / "t.model")


def test_train_takes_texts_of_a_few_characters_and_of_many(tmp_path):
    assert train(["abc"] * 3, 264, tmp_path / "t.model").encode("abc")[-1] > 258
    long = train(["ab" * 5000 + "xyz"], 265, tmp_path / "u.model")    # beyond sentencepiece's 4192
    assert long.decode([long.encode("z")[-1]]) == "z" and long.encode("z")[-1] > 258


def test_train_refuses_no_text(tmp_path):
    with pytest.raises(UserError, match="expected text"):
        train(["", "\n"], 300, tmp_path / "t.model")


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(100)])
def test_tokenizer_refuses_a_corrupt_file(content, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model: expected a sentencepiece model"):
        Tokenizer(path)


def test_tokenizer_refuses_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="tokenizer.model: expected a sentencepiece model"):
        Tokenizer(tmp_path / "tokenizer.model")
