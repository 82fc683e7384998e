"""Sampling against a slow loop without cache, scoring against one forward pass a token."""

import math

import pytest
import torch

from fgrlhf.rollout import COLUMNS, LARGE, compact, inverse_cdf, logits_of, sample
from fgrlhf.sequences import Scorer, by_length, locate, pack, score, unflatten
from tests.small import ids, llama, ragged, slow_logp

EOS = 2
PROMPTS = [ids(4, 1), ids(1, 2), ids(7, 3), ids(2, 4), ids(3, 5), ids(7, 6), ids(1, 7), ids(5, 8)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def responses(rollout) -> list[list[int]]:
    tokens, prompts, lengths = rollout.sequences
    return [tokens[i, p:p + n].tolist() for i, (p, n) in enumerate(zip(prompts, lengths))]


# ----- batches ------------------------------------------------------------------------------------

def test_pack_concatenates_ids_and_pads_on_the_right():
    packed = pack([[1, 5], [1]], [[7, 2], [8, 9, 2]])
    assert packed.tokens.tolist() == [[1, 5, 7, 2], [1, 8, 9, 2]]
    packed = pack([[1, 5, 6], [1]], [[7, 2], [8]])
    assert packed.tokens.tolist() == [[1, 5, 6, 7, 2], [1, 8, 0, 0, 0]]
    assert packed.prompt_lengths.tolist() == [3, 1] and packed.response_lengths.tolist() == [2, 1]
    assert packed.response_mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("prompts, answers", [([[1], []], [[2], [2]]), ([[1], [1]], [[2], []])])
def test_pack_refuses_an_empty_prompt_or_response(prompts, answers):
    with pytest.raises(ValueError, match="row 1"):
        pack(prompts, answers)


def test_rows_picks_rows_and_cuts_their_padding():
    batch = ragged((3, 1, 6), (5, 9, 1))
    picked = batch.rows(torch.tensor([2, 0]))
    assert picked.tokens.tolist() == batch.tokens[[2, 0], :8].tolist()
    assert picked.prompt_lengths.tolist() == [6, 3] and picked.response_lengths.tolist() == [1, 5]


def test_locate_names_row_step_position_and_target_of_every_response_token():
    batch = pack([[1, 5, 6], [1]], [[7, 2], [8, 9, 4]])
    at = locate(batch)
    assert list(zip(*(part.tolist() for part in at))) == [
        (0, 0, 3, 7), (0, 1, 4, 2), (1, 0, 1, 8), (1, 1, 2, 9), (1, 2, 3, 4)]
    assert unflatten(torch.arange(1.0, 6.0), at, batch).tolist() == [[1, 2, 0], [3, 4, 5]]


@pytest.mark.parametrize("size, expected", [
    (0, [[2, 3, 0, 4, 1]]), (2, [[2, 3], [0, 4], [1]]), (1, [[2], [3], [0], [4], [1]])])
def test_by_length_orders_rows_by_length(size, expected):
    """Lengths 9, 10, 2, 5 and 9 with their prompts."""
    batch = ragged((3, 1, 1, 2, 4), (6, 9, 1, 3, 5))
    assert [group.tolist() for group in by_length(batch, [0, 1, 2, 3, 4], size)] == expected
    assert by_length(batch, [1, 4], 0)[0].tolist() == [4, 1]
    assert by_length(batch, [], size) == []


@pytest.mark.parametrize("spare, expected", [(209, [[2, 3, 0, 4, 1]]), (208, [[2, 3, 0, 4], [1]]),
                                             (132, [[2, 3], [0, 4, 1]]),
                                             (37, [[2, 3], [0, 4], [1]]),
                                             (0, [[2], [3], [0, 4], [1]])])
def test_by_length_ends_a_group_where_attention_would_work_on_too_much_padding(
        spare, expected, monkeypatch):
    """Of all five 5 10^2 - 291 = 209 pairs are padding, of the first four and of the first three
    133, of the last three 38."""
    monkeypatch.setattr("fgrlhf.sequences.PADDING_BUDGET", spare)
    batch = ragged((3, 1, 1, 2, 4), (6, 9, 1, 3, 5))
    assert [group.tolist() for group in by_length(batch, [0, 1, 2, 3, 4], 0)] == expected


@pytest.mark.parametrize("size", [0, 1, 3])
def test_scorer_puts_every_value_where_it_belongs(size):
    """A critic whose value is a function of a token's id and place, in any groups of rows."""
    batch = ragged((3, 1, 6, 2), (5, 9, 1, 4))

    class Values(torch.nn.Module):
        def forward(self, s):
            at = locate(s)
            return unflatten(at.target * 100.0 + at.t, at, s)
    groups = by_length(batch, list(range(len(batch.tokens))), size)
    assert torch.equal(Scorer(batch, groups, 1.0).values(Values()), Values()(batch))


# ----- scoring ------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_score_equals_one_forward_pass_a_token(temperature):
    model = llama(dtype=torch.float64)
    batch = ragged()
    scored = score(model, batch, temperature)
    assert scored.shape == batch.response_mask.shape and scored.dtype == torch.float64
    for i, (p, n) in enumerate(zip(batch.prompt_lengths.tolist(), batch.response_lengths.tolist())):
        row = batch.tokens[i].tolist()
        expected = slow_logp(model, row[:p], row[p:p + n], temperature)
        assert scored[i, :n].tolist() == pytest.approx(expected, abs=1e-10)
        assert not scored[i, n:].any()


def test_score_belongs_to_the_token_and_not_to_the_next_one():
    """Changing the last token leaves every earlier log-probability as it was."""
    model, batch = llama(), ragged((3,), (5,))
    changed = batch._replace(tokens=batch.tokens.clone())
    changed.tokens[0, -1] = (changed.tokens[0, -1] + 1) % 24
    before, after = score(model, batch)[0], score(model, changed)[0]
    assert torch.equal(before[:4], after[:4]) and before[4] != after[4]


# ----- sampling -----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sample_returns_the_logp_that_score_computes(dtype, tolerance, temperature):
    """Unequal prompts, rows that end at different steps and leave the cache, rows that are cut."""
    policy = llama(dtype=dtype)
    rollout = sample(policy, PROMPTS * 4, EOS, 20, temperature, generator(3))
    assert len(set(rollout.sequences.response_lengths.tolist())) > 5       # compaction has happened
    assert 0 < int(rollout.truncated.sum()) < len(rollout.truncated)
    scored = score(policy, rollout.sequences, temperature)
    assert (scored - rollout.logp_old).abs().max() <= tolerance
    assert not rollout.logp_old[~rollout.sequences.response_mask].any()


def test_sample_and_scorer_return_what_autograd_may_keep():
    """Both run in inference mode, whose own tensors no backward pass accepts."""
    model = llama()
    rollout = sample(model, PROMPTS, EOS, 6, 1.0, generator())
    assert not any(x.is_inference() for x in (*rollout.sequences, *rollout[1:]))
    part = rollout.sequences.rows(torch.tensor([0, 2]))
    values = Scorer(rollout.sequences, [torch.arange(8)], 1.0).logp(model)
    assert not values.requires_grad and not values.is_inference()
    (score(model, part) * values[[0, 2], :int(part.response_lengths.max())]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sample_equals_the_slow_loop_over_the_same_uniforms():
    policy = llama(dtype=torch.float64)
    rollout = sample(policy, PROMPTS, EOS, 12, 0.8, generator(5))
    uniform = torch.rand(len(PROMPTS), 12, generator=generator(5), dtype=torch.float64).tolist()
    for prompt, row, got in zip(PROMPTS, uniform, responses(rollout)):
        expected = []
        for u in row:
            logits = policy(torch.tensor([prompt + expected]))[0, -1] / 0.8
            mass, token = 0.0, 0
            for token, p in enumerate(logits.softmax(0).tolist()):
                mass += p
                if mass > u:
                    break
            expected.append(token)
            if token == EOS:
                break
        assert got == expected


def test_sample_does_not_depend_on_the_rest_of_the_batch():
    policy = llama(dtype=torch.float64)
    alone = sample(policy, PROMPTS[:1], EOS, 15, 1.0, generator(1))
    together = sample(policy, PROMPTS, EOS, 15, 1.0, generator(1))
    assert responses(alone)[0] == responses(together)[0]


def test_sample_is_greedy_at_temperature_zero():
    policy = llama(dtype=torch.float64)
    rollout = sample(policy, PROMPTS, EOS, 10, 0.0)
    for i, (prompt, got) in enumerate(zip(PROMPTS, responses(rollout))):
        for t, token in enumerate(got):
            logits = policy(torch.tensor([prompt + got[:t]]))[0, -1]
            assert token == logits.argmax().item()
        assert rollout.logp_old[i, :len(got)].tolist() == pytest.approx(slow_logp(policy, prompt,
                                                                                  got), abs=1e-9)


def test_sample_marks_a_response_truncated_unless_its_last_token_is_eos():
    rollout = sample(llama(), PROMPTS * 4, EOS, 20, 1.0, generator(3))
    for got, cut in zip(responses(rollout), rollout.truncated.tolist()):
        assert cut == (got[-1] != EOS) and EOS not in got[:-1]
        assert not cut or len(got) == 20


def test_sample_stops_at_the_end_of_the_context():
    policy = llama(max_seq_len=12)
    rollout = sample(policy, [ids(7, 3), ids(2, 4)], eos_id=-1, max_new_tokens=50,
                     generator=generator())
    assert rollout.sequences.response_lengths.tolist() == [5, 5] and rollout.truncated.all()
    with pytest.raises(ValueError, match="max_seq_len = 12"):
        sample(policy, [ids(12)], EOS, 5)


def test_sample_ends_at_once_when_the_first_token_is_eos():
    policy = llama()
    first = sample(policy, PROMPTS[:1], EOS, 1, 0.0).sequences.tokens[0, -1].item()
    rollout = sample(policy, PROMPTS[:1], first, 10, 0.0)
    assert responses(rollout) == [[first]] and not rollout.truncated.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_of_a_large_vocabulary_are_scalar_products(rows, dtype):
    """In float32, 3 rows are computed in parts. The last part is narrower than the others."""
    draw = generator()
    hidden, head = (torch.randn(n, 4, dtype=dtype, generator=draw)
                    for n in (rows, LARGE + COLUMNS // 2 + 1))
    expected = (hidden[:, None] * head).sum(-1)
    torch.testing.assert_close(logits_of(hidden, head), expected, atol=1e-5, rtol=1e-5)


# ----- inverse CDF --------------------------------------------------------------------------------

def test_inverse_cdf_draws_each_token_as_often_as_its_probability():
    p = torch.tensor([0.05, 0.0, 0.5, 0.2, 0.25])
    n = 40_000
    drawn, _ = inverse_cdf(p.log().expand(n, -1),
                           torch.rand(n, dtype=torch.float64, generator=generator()))
    counts = torch.bincount(drawn, minlength=5)
    assert counts[1] == 0
    sigma = (n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() <= 4 * sigma).all()


@pytest.mark.parametrize("p", [[0, 0, 1, 0], [0, .5, .5, 0], [.25, 0, 0, .75], [0, 0, 0, 1]])
def test_inverse_cdf_never_takes_a_token_of_probability_zero(p):
    """Also at u = 0, at the largest u below 1, and at u exactly on a step of the CDF."""
    edges = torch.tensor([0.0, 5e-324, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    drawn, _ = inverse_cdf(torch.tensor(p).log().expand(len(edges), -1), edges)
    assert all(p[token] > 0 for token in drawn.tolist())
    assert drawn[0] == next(i for i, x in enumerate(p) if x)
    assert drawn[-1] == max(i for i, x in enumerate(p) if x)


def test_inverse_cdf_survives_probabilities_that_do_not_sum_to_one():
    """float32 log-softmax over many tokens sums to 1 +- 1e-5: the last token takes the last u."""
    logp = torch.log_softmax(torch.randn(1, 32000, generator=generator()), -1) - 1e-4
    assert inverse_cdf(logp, torch.tensor([1 - 2**-53], dtype=torch.float64))[0] == 31999


def test_inverse_cdf_returns_the_log_probability_of_its_token():
    logits = 30 * torch.randn(50, 11, dtype=torch.float64, generator=generator())
    token, logp = inverse_cdf(logits, torch.rand(50, dtype=torch.float64, generator=generator(1)))
    for row, t, got in zip(logits.tolist(), token.tolist(), logp.tolist()):
        total = sum(math.exp(x - max(row)) for x in row)
        assert got == pytest.approx(row[t] - max(row) - math.log(total), abs=1e-12)


@pytest.mark.parametrize("going, rows", [
    ([1, 1, 1, 1], [0, 1, 2, 3]), ([0, 1, 1, 1], [3, 1, 2]), ([1, 0, 1, 0], [0, 2]),
    ([0, 0, 1, 1], [2, 3]), ([1, 1, 0, 0], [0, 1]), ([0, 0, 0, 0], [])])
def test_compact_moves_the_last_rows_into_the_gaps(going, rows):
    assert compact(torch.tensor(going, dtype=torch.bool)).tolist() == rows
