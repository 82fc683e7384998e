"""Records to ids: limits, EOS, cuts, the sets of equation (3), error spans by token."""

import json

import pytest

import train_rm
from fgrlhf import sft
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Demonstration, Edit, Pair, Passage, Prompt, Span, write_jsonl
from fgrlhf.encode import (
    COUNTED, HIDDEN, Encoder, encode_prompt, read_encoded, span_types)
from fgrlhf.engine.config import parse
from fgrlhf.tokenizer import Tokenizer, train
from tests.small import ppo_folder
from tests.test_bpe import small
from tests.test_tokenizer import lossy


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Every word of the texts below is one piece, its blank included."""
    return train(["the river is red and the bear is big now ->"] * 50, 310,
                 tmp_path_factory.mktemp("t") / "t.model")


def pieces(tokenizer, ids) -> list[str]:
    return [tokenizer.decode([i]) if i != tokenizer.eos_id else "EOS" for i in ids]


def preference(tokenizer, worse: str, better: str, context: int = 64, **options):
    encoder = Encoder(tokenizer, context, "plain", **options)
    return encoder.preference(Edit("e", "the river", worse, better))


def test_encode_prompt_begins_with_bos_and_keeps_the_limit(tokenizer):
    record = Prompt("p", "the river is red and the bear is big now")
    full = encode_prompt(tokenizer, record, "plain", 64)
    assert full[0] == tokenizer.bos_id and tokenizer.decode(full) == record.prompt + " ->"
    n = len(full)
    assert encode_prompt(tokenizer, record, "plain", n) == full
    with pytest.raises(UserError, match=f"'p'.*at most {n - 1} tokens, got {n}"):
        encode_prompt(tokenizer, record, "plain", n - 1)


def test_a_longer_prompt_keeps_bos_and_its_end_and_is_counted(tokenizer):
    record = Prompt("p", "the river is red and the bear is big now")
    full = encode_prompt(tokenizer, record, "plain", 64)
    n = len(full)
    for limit in (n - 1, 3, 2):
        encoder = Encoder(tokenizer, 64, "plain", limit)
        assert encoder.prompt(record) == full[:1] + full[n - limit + 1:]
        assert encoder.counts == {"prompts_cut": 1}
    assert Encoder(tokenizer, 64, "plain", n).prompt(record) == full
    assert Encoder(tokenizer, 9, "plain", n).prompt(record) == full[:1] + full[n - 7:]   # context
    with pytest.raises(UserError, match=f"'p'.*at most {n - 1} tokens"):
        Encoder(tokenizer, n, "plain").prompt(record)


def test_a_longer_prompt_keeps_its_end_without_bos_too(tokenizer):
    without = Tokenizer(tokenizer.path, adds_bos=False)
    ids = Encoder(without, 64, "plain", 4).prompt(Prompt("p", "the river is red and big"))
    assert ids == without.encode("the river is red and big ->")[-4:]


def test_a_prompt_without_a_token_is_refused_by_name(tmp_path):
    """The first token of a response needs a position before it. The character has no byte there."""
    found = small(lacking=b"\x04", adds_bos=False)
    for options in ({}, {"prompt_tokens": 8}):
        with pytest.raises(UserError, match="'p': prompt: expected a token, because this model"):
            Encoder(found, 64, "{prompt}", **options).prompt(Prompt("p", "\x04"))
    assert Encoder(found, 64, "{prompt}").prompt(Prompt("p", "\x04a")) == found.encode("a")


def test_a_response_ends_with_eos_unless_the_context_cuts_it(tokenizer):
    def response(text, context):
        encoder = Encoder(tokenizer, context, "plain", cut_responses=True)
        return encoder.response(Prompt("p", "x"), text, [1] * 10)
    full = response("the bear is big", 64)
    assert full[-1] == tokenizer.eos_id and tokenizer.decode(full) == "the bear is big"
    assert response("the bear is big", 10 + len(full) - 1) == full[:-1]
    assert response("", 64) == [tokenizer.eos_id]


@pytest.mark.parametrize("unit", ["token", "word"])
def test_encode_preference_sets_of_a_substitution(tokenizer, unit):
    p = preference(tokenizer, "the river is red", "the river is big", unit=unit)
    assert [pieces(tokenizer, p.chosen)[i].strip() for i in p.plus] == ["big"]
    assert [pieces(tokenizer, p.rejected)[i].strip() for i in p.minus] == ["red"]
    assert p.unchanged == [(i, i) for i in range(5) if i != 3]
    assert all(p.chosen[i] == p.rejected[j] for i, j in p.unchanged)


def test_encode_preference_pairs_unchanged_tokens_as_chosen_then_rejected(tokenizer):
    """"the [red] bear": what stands behind the insertion has moved by one on the chosen side."""
    p = preference(tokenizer, "the bear is", "the red bear is")
    assert p.unchanged == [(0, 0), (3, 2), (4, 3)]       # the, is, EOS; "bear" has the gap's credit
    p = preference(tokenizer, "the bear is", "the red bear is", credit_gap=False)
    assert p.unchanged == [(0, 0), (2, 1), (3, 2), (4, 3)]


@pytest.mark.parametrize("unit", ["token", "word"])
def test_encode_preference_credits_eos_with_an_omission_at_the_end(tokenizer, unit):
    """The original stopped too early: its EOS is what the policy chose in place of "now"."""
    p = preference(tokenizer, "the bear is big", "the bear is big now", unit=unit)
    assert [pieces(tokenizer, p.chosen)[i].strip() for i in p.plus] == ["now"]
    assert [pieces(tokenizer, p.rejected)[i].strip() for i in p.minus] == ["EOS"]
    p = preference(tokenizer, "the bear is big", "the bear is big now", unit=unit, credit_gap=False)
    assert p.minus == []


def test_encode_preference_takes_the_sides_of_a_pair(tokenizer):
    p = Encoder(tokenizer, 64, "plain").preference(Pair("p", "the river", "the bear", "the river"))
    assert tokenizer.decode(p.chosen) == "the bear" and tokenizer.decode(p.rejected) == "the river"


# ----- responses that do not fit ------------------------------------------------------------------

LONG = "the river is red and the bear is"           # 8 tokens; the prompt below has 4


@pytest.mark.parametrize("unit", ["token", "word"])
def test_a_response_that_does_not_fit_is_refused_by_name(tokenizer, unit):
    assert len(preference(tokenizer, LONG, LONG + " big", 14, unit=unit).chosen) == 10   # just fits
    with pytest.raises(UserError, match="'e': response: expected at most 9 tokens behind its prompt"
                                        " of 4, .* is 13, got 10; .*--cut-responses"):
        preference(tokenizer, LONG, LONG + " big", 13, unit=unit)


@pytest.mark.parametrize("unit", ["token", "word"])
@pytest.mark.parametrize("credit_gap", [True, False])
def test_a_cut_changes_no_label_in_front_of_it(tokenizer, unit, credit_gap):
    """The alignment is that of the whole texts: an untouched tail does not become U1."""
    worse, better = LONG + " big now", "the river and red is red and the bear is big"
    whole = preference(tokenizer, worse, better, unit=unit, credit_gap=credit_gap)
    for room in range(1, len(whole.chosen) + 1):
        cut = preference(tokenizer, worse, better, 4 + room, unit=unit, credit_gap=credit_gap,
                         cut_responses=True)
        assert (cut.chosen, cut.rejected) == (whole.chosen[:room], whole.rejected[:room])
        assert cut.plus == [t for t in whole.plus if t < room]
        assert cut.minus == [t for t in whole.minus if t < room]
        assert cut.unchanged == [pair for pair in whole.unchanged if max(pair) < room]
        assert cut.change == whole.change


def test_where_exactly_one_side_is_cut_its_tail_stays_unchanged(tokenizer):
    """context = prompt + len(y-): alignment behind the cut called the tail and EOS changed."""
    p = preference(tokenizer, LONG, "now the bear and " + LONG, 4 + 9, cut_responses=True)
    assert p.minus == [0] and len(p.rejected) == 9 and len(p.chosen) == 9       # the gap's credit
    assert p.plus == [0, 1, 2, 3]


def files(tmp_path, edits: list[Edit]):
    folder = ppo_folder(tmp_path)                   # context 48
    write_jsonl(tmp_path / "edits.jsonl", edits)
    return folder


def test_trainers_refuse_or_cut_count_and_leave_out(tmp_path, capfd):
    tail = " it is red" * 20
    folder = files(tmp_path, [Edit("fits", "name", "it is", "it is red",
                                   context=(Passage("A title", "A passage"),)),
                              Edit("early", "name", "it is" + tail, "is it" + tail),
                              Edit("late", "name", "it is" + tail, "it is" + tail + " red")])
    common = ["--data", f"{tmp_path}/edits.jsonl", "--model", f"{folder}/policy", "--epochs", "1",
              "--batch", "2"]
    for name, train, kind in (("sft", sft.train, []), ("token", train_rm.train, []),
                              ("sequence", train_rm.train, ["--kind", "sequence"])):
        config = sft.Config if train is sft.train else train_rm.Config
        out = ["--out", f"{tmp_path}/{name}-out"]
        with pytest.raises(UserError, match="'early': response: expected at most"):
            train(parse(config, "", common + out + kind))
        capfd.readouterr()
        train(parse(config, "", common + kind + ["--out", f"{tmp_path}/{name}-cut",
                                                 "--cut-responses"]))
        done = json.loads((tmp_path / f"{name}-cut/done.json").read_text())
        cut = 2 if name == "sft" else 4             # one side of two records, or both
        expected = dict.fromkeys(COUNTED, 0) | {"responses_cut": cut}
        if name != "sft":
            expected["equal_in_tokens"] = 1         # "late" is not trained on
        assert {key: done[key] for key in COUNTED} == expected
        assert done["records"] == (3 if name == "sft" else 2)
        said = capfd.readouterr().err
        assert f"{cut} responses lost their end and EOS (--cut-responses)" in said
        assert said.count("1 records have passages (context) that the template plain does not") == 1
        left_out = ": left out 1 of 3 records: both sides have the same tokens up to the cut"
        assert (left_out in said) == (name != "sft")


def test_a_record_that_is_refused_leaves_no_count(tokenizer):
    """Its prompt was cut, and then its response did not fit."""
    encoder = Encoder(tokenizer, 8, "plain", 3)
    prompt = "the river is red and the bear is big"
    for refused in (lambda: encoder.preference(Edit("e", prompt, LONG, LONG + " big")),
                    lambda: encoder.demonstration(Demonstration("d", prompt, LONG))):
        with pytest.raises(UserError, match="response: expected at most 5 tokens"):
            refused()
        assert not +encoder.counts
    encoder.demonstration(Demonstration("d", prompt, "the bear"))
    assert encoder.counts["prompts_cut"] == 1


# ----- tokenizers that change the text ------------------------------------------------------------

def test_error_spans_and_words_follow_a_tokenizer_that_changes_the_text(tmp_path):
    """Blanks collapse and "½" becomes "1⁄2", so that decoded text has other offsets."""
    tokenizer = lossy(tmp_path)
    text = "the  river  ½  and  the  stone  is  red  and  green"
    marked = span_types(tokenizer, text, (Span(text.index("red"), text.index("red") + 3, "wrong"),))
    ids = tokenizer.encode(text)
    assert tokenizer.decode([i for i, kind in zip(ids, marked) if kind]).strip() == "red"
    encoder = Encoder(tokenizer, 256, "plain", unit="word")
    edit = Edit("e", "say", "one ½  ½ tree  is red", "one ½  ½ tree  is green")
    p = encoder.preference(edit)
    assert tokenizer.decode([p.rejected[t] for t in p.minus]).strip() == "red"
    assert tokenizer.decode([p.chosen[t] for t in p.plus]).strip() == "green"
    assert encoder.counts["responses_changed_by_tokenizer"] == 2


def test_edits_of_what_the_tokenizer_drops_are_left_out_and_counted(tmp_path, capfd):
    write_jsonl(tmp_path / "e.jsonl", [Edit("1", "say", "the  river", "the river"),
                                       Edit("2", "say", "the river", "the stone")])
    encoder = Encoder(lossy(tmp_path), 64, "plain")
    records, _ = read_encoded(str(tmp_path / "e.jsonl"), encoder, False, None, "stop")
    assert [record.id for record in records] == ["2"]
    assert encoder.counted("e.jsonl") == dict.fromkeys(COUNTED, 0) | {
        "equal_in_tokens": 1, "responses_changed_by_tokenizer": 1}
    assert "left out 1 of 2 records" in capfd.readouterr().err


def test_edits_without_a_changed_word_are_counted(tokenizer):
    encoder = Encoder(tokenizer, 64, "plain", unit="word")
    p = encoder.preference(Edit("e", "the river", "the river is", "the River, is"))
    assert (p.plus, p.minus) == ([], []) and encoder.counts["without_changed_token"] == 1


def test_span_types_marks_every_token_that_overlaps_a_span(tokenizer):
    """Characters of "the river is red": a span need not begin where a token does."""
    text = "the river is red"
    assert span_types(tokenizer, text, [Span(10, 16, "fact")]) == ["", "", "fact", "fact"]
    assert span_types(tokenizer, text,
                      [Span(9, 10, "blank"), Span(13, 14, "x")]) == ["", "", "blank", "x"]
    assert span_types(tokenizer, text, [Span(3, 4, "a")]) == ["", "a", "", ""]


def test_removed_is_what_the_editor_took_out_without_gap_credit(tokenizer):
    p = preference(tokenizer, "the river is red", "the bear is red and big")
    assert [pieces(tokenizer, p.rejected)[t] for t in p.removed] == ["river"]
    assert p.minus[-1] > p.removed[-1]                              # EOS, credited with the gap
    assert preference(tokenizer, "the river is", "the river is red").removed == ()


def test_swapped_is_the_preference_of_the_opposite_edit(tokenizer):
    p = preference(tokenizer, "the river is red", "the bear is red and big")
    q = preference(tokenizer, "the bear is red and big", "the river is red")
    assert p.swapped()._replace(removed=q.removed) == q


@pytest.mark.parametrize("unit", ["token", "word"])
def test_hide_leaves_out_the_source_or_the_ends(unit, tokenizer):
    whole, blind, bare, both = (preference(tokenizer, "the river is red.", "the bear is red.",
                                           hide=hide, unit=unit) for hide in HIDDEN)
    assert blind == whole._replace(prompt=[tokenizer.bos_id, *tokenizer.encode(" ->")])
    assert bare.prompt == whole.prompt and both == bare._replace(prompt=blind.prompt)
    assert pieces(tokenizer, bare.rejected) == ["the", "river", "is", "red"]
    assert pieces(tokenizer, bare.chosen) == ["the", "bear", "is", "red"]
    assert bare.minus == [1] == list(bare.removed) and bare.unchanged == [(0, 0), (2, 2), (3, 3)]


def test_read_encoded_leaves_out_what_differs_only_at_a_hidden_end(tokenizer, tmp_path, capsys):
    write_jsonl(tmp_path / "e.jsonl", [Edit("1", "the", "the river.", "the river"),
                                       Edit("2", "the", ".", "the"), Edit("3", "the", "is", "and")])
    encoder = Encoder(tokenizer, 64, "plain", hide="ends")
    records, _ = read_encoded(str(tmp_path / "e.jsonl"), encoder, False, None, "stop")
    assert [r.id for r in records] == ["3"]
    said = capsys.readouterr().err
    assert "both sides have the same tokens (1)" in said and "nothing is left" in said
