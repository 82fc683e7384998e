"""Records to ids: limits, EOS, the sets of equation (3), error spans by token."""

import pytest

from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Edit, Pair, Prompt, Span
from fgrlhf.encode import encode_preference, encode_prompt, encode_response, span_types
from fgrlhf.tokenizer import train


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Every word of the texts below is one piece, its blank included."""
    return train(["the river is red and the bear is big now ->"] * 50, 310,
                 tmp_path_factory.mktemp("t") / "t.model")


def pieces(tokenizer, ids) -> list[str]:
    return [tokenizer.decode([i]) if i != tokenizer.eos_id else "EOS" for i in ids]


def preference(tokenizer, worse: str, better: str, **options):
    prompt = tokenizer.encode("the river", bos=True)
    return encode_preference(tokenizer, Edit("e", "the river", worse, better), prompt, 64,
                             **options)


def test_encode_prompt_begins_with_bos_and_keeps_the_limit(tokenizer):
    record = Prompt("p", "the river is red and the bear is big now")
    full = encode_prompt(tokenizer, record, "plain", 64)
    assert full[0] == tokenizer.bos_id and tokenizer.decode(full) == record.prompt + " ->"
    n = len(full)
    assert encode_prompt(tokenizer, record, "plain", n) == full
    with pytest.raises(UserError, match=f"'p'.*at most {n - 1} tokens, got {n}"):
        encode_prompt(tokenizer, record, "plain", n - 1)
    for limit in (n - 1, 3, 2, 1):
        cut = encode_prompt(tokenizer, record, "plain", limit, keep_end=True)
        assert len(cut) == limit and cut == full[:1] + full[n - limit + 1:]


def test_encode_response_ends_with_eos_unless_the_context_cuts_it(tokenizer):
    text = "the bear is big"
    full = encode_response(tokenizer, text, [1] * 10, 64)
    assert full[-1] == tokenizer.eos_id and tokenizer.decode(full) == text
    assert encode_response(tokenizer, text, [1] * 10, 10 + len(full) - 1) == full[:-1]
    assert encode_response(tokenizer, "", [1], 64) == [tokenizer.eos_id]


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
    prompt = tokenizer.encode("the river", bos=True)
    p = encode_preference(tokenizer, Pair("p", "the river", "the bear", "the river"), prompt, 64)
    assert tokenizer.decode(p.chosen) == "the bear" and tokenizer.decode(p.rejected) == "the river"


@pytest.mark.parametrize("unit", ["token", "word"])
def test_encode_preference_cuts_both_sides_to_the_context(tokenizer, unit):
    prompt = tokenizer.encode("the river", bos=True)
    edit = Edit("e", "the river", "the river is red and big", "the bear is red and big now")
    p = encode_preference(tokenizer, edit, prompt, len(prompt) + 3, unit)
    assert len(p.chosen) == len(p.rejected) == 3
    assert all(i < 3 for i in p.plus + p.minus) and all(i < 3 and j < 3 for i, j in p.unchanged)


def test_span_types_marks_every_token_that_overlaps_a_span(tokenizer):
    """Characters of "the river is red": a span need not begin where a token does."""
    ids = tokenizer.encode("the river is red", eos=True)
    assert [t.strip() for t in pieces(tokenizer, ids)] == ["the", "river", "is", "red", "EOS"]
    assert span_types(tokenizer, ids, [Span(10, 16, "fact")]) == ["", "", "fact", "fact", ""]
    assert span_types(tokenizer, ids,
                      [Span(9, 10, "blank"), Span(13, 14, "x")]) == ["", "", "blank", "x", ""]
    assert span_types(tokenizer, ids, [Span(3, 4, "a")]) == ["", "a", "", "", ""]
