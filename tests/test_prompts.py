"""Prompts that rows share are computed once: the same numbers and gradients from fewer tokens."""

import pytest
import torch

from fgrlhf.controls import LogpReward
from fgrlhf.engine.lora import adapt, adapters
from fgrlhf.frozen import FrozenStates
from fgrlhf.encode import PreferenceIds
from fgrlhf.model import LLaMA
from fgrlhf.prompts import SharedPrompts, same_prompts
from fgrlhf.rollout import sample
from fgrlhf.sequences import by_length, hidden_at, hidden_before, locate, pack, score
from tests.small import gradients, ids, llama, slow_logp, with_garbage
from tests.test_padding import Rows

X, Y, Z = ids(12, 1), ids(11, 2), ids(3, 3)
BATCH = pack([X, Y, X, Y, X, Z], [ids(n, 20 + n) for n in (1, 3, 2, 4, 3, 2)])
NUMBERS = 12 + 11 + 3 + 15                      # the prompts once, and all responses


def whole_rows(monkeypatch):
    """Computes every prompt again from here on."""
    for place in ("sequences", "rollout"):
        monkeypatch.setattr(f"fgrlhf.{place}.same_prompts", lambda *_: None)


def same(batch=BATCH) -> torch.Tensor | None:
    return same_prompts(batch.tokens, batch.prompt_lengths, int(batch.lengths.sum()))


# ----- which rows share ---------------------------------------------------------------------------

def test_same_prompts_names_the_first_row_with_each_prompt():
    assert same().tolist() == [0, 1, 0, 1, 0, 5]


def test_same_prompts_compares_whole_prompts_and_no_responses():
    """A prompt that begins like another, or like another with its response, is another prompt."""
    batch = pack([X, X[:-1], X, X, X + [5]], [[7], [X[-1]], [8], [5], [7]])
    assert same(batch).tolist() == [0, 1, 0, 0, 4]


@pytest.mark.parametrize("response, shared", [(3, False), (2, True)])
def test_same_prompts_keeps_rows_whole_unless_prompts_are_twice_as_long(response, shared):
    batch = pack([X[:6]] * 2, [ids(response, 1), ids(response, 2)])
    assert (same(batch) is not None) == shared


@pytest.mark.parametrize("rows, shared", [(6, False), (5, True)])
def test_same_prompts_keeps_rows_whole_where_little_is_saved(rows, shared):
    """One of 6 rows of 12 + 4 tokens is 1/8 of the 96 tokens, but one of 5 is more."""
    others = [ids(12, seed) for seed in range(5, 3 + rows)]
    batch = pack([X, X, *others], [ids(4, seed) for seed in range(rows)])
    assert (same(batch) is not None) == shared


# ----- the layout ---------------------------------------------------------------------------------

def test_strip_takes_each_prompt_once_then_the_responses():
    batch = pack([[5, 6, 7], [5, 6, 7], [8]], [[1], [2, 3], [4]])
    first = torch.tensor([0, 0, 2])
    shared = SharedPrompts(batch.prompt_lengths, batch.response_lengths, first, 5)
    assert shared.strip(batch.tokens).tolist() == [[5, 6, 7, 8, 1, 2, 3, 4]]
    assert shared.positions.tolist() == [[0, 1, 2, 0, 3, 3, 4, 1]]
    rows = shared.restore(shared.strip(batch.tokens)[..., None])[..., 0]
    assert rows.tolist() == batch.tokens.tolist()
    assert shared.visible[2, 0].int().tolist() == [[1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]


def test_no_matmul_of_the_trunk_computes_a_prompt_twice():
    model = llama()
    with torch.no_grad(), Rows() as rows:
        hidden_at(model, BATCH, locate(BATCH))
    assert rows.seen == {NUMBERS}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_hidden_states_and_gradients_are_those_of_whole_rows(rank, checkpointing, monkeypatch):
    model, batch = llama(dtype=torch.float64), with_garbage(BATCH, more=2)
    if rank:
        model = adapt(model, rank)
        for part in adapters(model).values():
            part.data.normal_()
    model.activation_checkpointing = checkpointing
    at, weights, found = locate(batch), torch.randn(2, 16, dtype=torch.float64), []
    for _ in range(2):
        hidden = torch.cat([hidden_at(model, batch, at), hidden_before(model, batch, at)])
        (hidden.tanh() @ weights.T).sum().backward()
        found.append({"hidden": hidden.detach()} | gradients(model))
        whole_rows(monkeypatch)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-11, rtol=1e-11)


def test_a_response_of_the_same_prompt_changes_nothing():
    """Neither hidden states nor gradients of one response depend on the other's tokens."""
    model, other = llama(dtype=torch.float64), BATCH._replace(tokens=BATCH.tokens.clone())
    other.tokens[2, 12:14] = torch.tensor([3, 4])
    assert same(other) is not None and not torch.equal(other.tokens, BATCH.tokens)
    at = locate(BATCH)
    before, after = (hidden_at(model, batch, at) for batch in (BATCH, other))
    changed = (before != after).any(1)
    assert set(at.row[changed].tolist()) == {2}


# ----- those who use it ---------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_score_equals_one_forward_pass_a_token(dtype, tolerance):
    model = llama(dtype=dtype)
    found = score(model, BATCH)
    for i, (p, n) in enumerate(zip(*(part.tolist() for part in BATCH[1:]))):
        row = BATCH.tokens[i].tolist()
        assert found[i, :n].tolist() == pytest.approx(slow_logp(model, row[:p], row[p:p + n]),
                                                      abs=tolerance)


def test_the_ablation_reads_the_same_states(monkeypatch):
    model = LogpReward(llama(dtype=torch.float64))
    model.logp_weight.data.fill_(0.7)
    shared = model.token_rewards(BATCH)
    whole_rows(monkeypatch)
    torch.testing.assert_close(shared, model.token_rewards(BATCH), atol=1e-10, rtol=0)


def test_frozen_states_compute_the_prompt_of_an_edit_once(monkeypatch):
    examples = [PreferenceIds(x, ids(3, n), ids(2, n), [], [], [])
                for n, x in enumerate((X, Y, ids(11, 4)))]
    states = FrozenStates(llama(), None)
    with Rows() as rows:
        states.add(examples)
    assert rows.seen == {12 + 11 + 11 + 3 * 5}
    whole_rows(monkeypatch)
    again = FrozenStates(states.trunk, None)
    again.add(examples)
    assert states.kept.keys() == again.kept.keys() and len(states.kept) == 6
    for key, hidden in again.kept.items():
        torch.testing.assert_close(states.kept[key], hidden, atol=1e-5, rtol=0)


def test_by_length_keeps_rows_of_one_prompt_together():
    """By length alone the rows of X, of 13 and 15 tokens, would have those of Y between them."""
    batch = pack([X, Y, X, Y], [ids(1), ids(3), ids(3), ids(2)])
    assert [group.tolist() for group in by_length(batch, [0, 1, 2, 3], 2)] == [[0, 2], [3, 1]]


@pytest.mark.parametrize("prompts", [[X] * 3 + [Y] * 3, [X, Y, Y, X, Y, X]])
def test_sample_draws_the_same_responses_from_a_prompt_computed_once(prompts, monkeypatch):
    """In any order of the rows; rows leave the batch at different times."""
    policy, draw, shapes, hidden = llama(), torch.Generator(), [], LLaMA.hidden
    monkeypatch.setattr(LLaMA, "hidden", lambda self, tokens, *rest, **more: (
        shapes.append(tuple(tokens.shape)), hidden(self, tokens, *rest, **more))[1])
    shared = sample(policy, prompts, 2, 4, 1.0, draw.manual_seed(4))
    assert shapes[0] == (2, 12) and shapes[1][1] == 1
    whole_rows(monkeypatch)
    whole = sample(policy, prompts, 2, 4, 1.0, draw.manual_seed(4))
    assert all(torch.equal(a, b) for a, b in zip(shared.sequences, whole.sequences))
    assert len(set(whole.sequences.response_lengths.tolist())) > 1
    torch.testing.assert_close(shared.logp_old, whole.logp_old, atol=1e-5, rtol=0)
