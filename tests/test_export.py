"""Models and tokenizers for other programs: right ids, or refused before anything is written."""

import json

import pytest
import sentencepiece
import torch

from fgrlhf.checkpoint import ExportConfig, export, load_model, load_tokenizer, save_model
from fgrlhf.data.fields import UserError
from fgrlhf.engine.encoding import Encoding, read_encoding, write_encoding
from fgrlhf.layouts.huggingface_tokenizer import _has_ties, fields, write_tokenizer
from fgrlhf.reward import RewardModel, save_reward
from fgrlhf.tokenizer import Piece, Tokenizer, train
from tests.test_checkpoint import same, slow_bpe, variant

WORDS = "the river and bank stone is red green blue one half tree bird".split()
LINES = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(12)) + "."
         for i in range(300)]
PLAIN = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
         "remove_extra_whitespaces": False, "vocab_size": 320, "hard_vocab_limit": False}


def trained(path, lines=LINES, **options) -> Tokenizer:
    """Trains as sentencepiece's own command does, with any options."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path), minloglevel=2, **(PLAIN | options))
    return Tokenizer(path.with_suffix(".model"))


@pytest.fixture
def tokenizer(tmp_path):
    return train(["hello world, hello there"] * 3, 272, tmp_path / "some" / "tokenizer.model")


# ----- the tokenizer ------------------------------------------------------------------------------

TEXTS = ["", " ", "the red river", "<|im_start|>the  river<|im_end|>", "the </s> river<s>",
         "½ ﬁ e\u0301", "▁the▁▁river", "  the \n\n river\t", "\u3000the\xa0river", "<0x41>the<unk>",
         "İ😀\x00"]


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False},
                                     {"split_by_whitespace": False, "vocab_size": 400}])
def test_tokenizer_json_gives_our_ids(options, tmp_path):
    tokenizer = trained(tmp_path / "t", **options)
    written = json.loads(json.dumps(write_tokenizer(tokenizer)))
    for text in TEXTS + LINES[:20]:
        assert slow_bpe(text, written) == tokenizer.encode(text), text


def test_runs_and_repetitions_get_our_ids(tmp_path):
    """Pieces such as "abab" and "aaa" overlap with themselves in a text."""
    lines = ["ab" * (i % 9 + 1) + "a" * (i % 7) + "b" * (i % 4) for i in range(200)]
    tokenizer = trained(tmp_path / "t", lines, vocab_size=400)
    written = write_tokenizer(tokenizer)
    for text in lines + ["a" * n + "ba" * (n % 5) for n in range(40)]:
        assert slow_bpe(text, written) == tokenizer.encode(text), text


@pytest.mark.parametrize("options, reason", [
    ({"model_type": "unigram", "vocab_size": 290}, "it is not BPE"),
    ({"model_type": "char"}, "it is not BPE"),
    ({"user_defined_symbols": ["<|im_start|>"]}, "it has user-defined symbols"),
    ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
    ({"remove_extra_whitespaces": True}, "it removes extra blanks"),
    ({"treat_whitespace_as_suffix": True}, "its pieces end in their blanks"),
    ({"byte_fallback": False, "vocab_size": 80}, "it has no byte pieces")])
def test_a_tokenizer_whose_ids_would_differ_is_refused(options, reason, tmp_path):
    tokenizer = trained(tmp_path / "t", **options)
    model = variant(vocab_size=tokenizer.vocab_size)
    with pytest.raises(UserError, match=f"t.model: expected a tokenizer of LLaMA's kind.*{reason}"):
        save_model(model, tmp_path / "hf", "hf", tokenizer)
    assert not (tmp_path / "hf").exists()
    save_model(model, tmp_path / "meta", "meta", tokenizer)             # its own layout keeps it
    with pytest.raises(UserError, match=reason):
        export(ExportConfig(model=str(tmp_path / "meta"), out=str(tmp_path / "hf")))
    assert not (tmp_path / "hf").exists()
    export(ExportConfig(model=str(tmp_path / "meta"), out=str(tmp_path / "hf"), tokenizer=False))
    assert same(load_model(tmp_path / "hf"), model)


def test_equal_scores_are_refused_where_their_order_matters():
    def ties(*texts: str) -> bool:
        return _has_ties([Piece(text, -1.0, True) for text in texts])
    assert not ties("ab") and not ties("aa", "aaa", "aaaa") and not ties("aa", "aaa", "bb")
    assert ties("ab", "bc") and ties("aa", "aaaa") and ties("aa", "ab")
    assert not _has_ties([Piece("ab", -1.0, True), Piece("bc", -2.0, True), Piece("a", -1.0, True)])


def test_fields_of_a_protocol_buffer_by_hand():
    assert list(fields(b"\x08\x96\x01\x12\x02hi\x1d\0\0\x80\x3f")) == [
        (1, 150), (2, b"hi"), (3, b"\0\0\x80\x3f")]


# ----- the command --------------------------------------------------------------------------------

def test_export_writes_another_layout_and_dtype(tmp_path, tokenizer, capsys):
    model = variant(vocab_size=277)
    save_model(model, tmp_path / "m", tokenizer=tokenizer)
    write_encoding(tmp_path / "m", Encoding("alpaca", 64))
    export(ExportConfig(model=str(tmp_path / "m"), out=str(tmp_path / "hf"), dtype="bfloat16"))
    assert read_encoding(tmp_path / "hf") == Encoding("alpaca", 64)
    assert capsys.readouterr().out == f"{tmp_path / 'hf'}: complete\n"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["vocab_size"], config["torch_dtype"]) == (277, "bfloat16")
    written = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    assert len(written["model"]["vocab"]) == 272
    assert load_tokenizer(tmp_path / "hf").sha256 == tokenizer.sha256
    export(ExportConfig(model=str(tmp_path / "hf"), out=str(tmp_path / "back"), layout="meta",
                        tokenizer=False))
    assert same(load_model(tmp_path / "back"), model.to(torch.bfloat16))


def test_export_refuses_a_reward_model_and_a_folder_in_use(tmp_path, tokenizer):
    save_reward(RewardModel(variant(), "token"), tmp_path / "r", tokenizer)
    with pytest.raises(UserError, match="expected a language model, got a reward model"):
        export(ExportConfig(model=str(tmp_path / "r"), out=str(tmp_path / "hf")))
    save_model(variant(), tmp_path / "m", tokenizer=tokenizer)
    for layout in ("hf", "meta"):           # the second would round the model itself to bfloat16
        with pytest.raises(UserError, match="already holds consolidated.00.pth"):
            export(ExportConfig(model=str(tmp_path / "m"), out=str(tmp_path / "m"), layout=layout,
                                dtype="bfloat16"))
    assert same(load_model(tmp_path / "m"), variant())
