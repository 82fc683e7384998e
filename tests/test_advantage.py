"""Equations (5) and (6), and GAE, against slow loops by their definitions in float64."""

import math

import pytest
import torch

from fgrlhf.advantage import penalise_kl, reward_to_go, standardise
from fgrlhf.baseline import generalised_advantage
from fgrlhf.group import group_advantage

LENGTHS = [7, 1, 4, 6]
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]


def numbers(seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spoiled(x: torch.Tensor) -> torch.Tensor:
    """The worst there is, in the padding."""
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1e30],
                       dtype=x.dtype).repeat(7)[:28].reshape(4, 7)
    return torch.where(MASK, x, bad)


# ----- (5) ----------------------------------------------------------------------------------------

def test_penalise_kl_by_hand():
    """r = 1, 2; logp_old - logp_ref = 0.5, -1; beta = 2: 1 - 1 = 0, 2 + 2 = 4."""
    out = penalise_kl(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[-1.0, -3.0, 9.0]]),
                      torch.tensor([[-1.5, -2.0, 9.0]]), torch.tensor([[True, True, False]]),
                      beta=2.0)
    assert out.tolist() == [[0.0, 4.0, 0.0]]


def test_penalise_kl_ignores_padding():
    x = [numbers(i) for i in range(3)]
    assert torch.equal(penalise_kl(*x, MASK, 0.3), penalise_kl(*map(spoiled, x), MASK, 0.3))


def test_penalise_kl_refuses_a_tensor_of_the_whole_sequence():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError,
                       match=r"expected \(B, T\) = \(2, 3\).*\(2, 5\).*response part only"):
        penalise_kl(x, torch.zeros(2, 5), x, x.bool(), 0.1)


# ----- (6) ----------------------------------------------------------------------------------------

def test_standardise_by_hand():
    """1, 2, 3, 6 over both rows: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5; mean square 12.5."""
    x, mask = torch.tensor([[1.0, 2.0, 7.0],
                            [3.0, 6.0, 7.0]]).double(), torch.tensor([[True, True, False]] * 2)
    expected = {"mean-std": [[-2 / 3.5**.5, -1 / 3.5**.5, 0], [0, 3 / 3.5**.5, 0]],
                "rms": [[1 / 12.5**.5, 2 / 12.5**.5, 0], [3 / 12.5**.5, 6 / 12.5**.5, 0]],
                "none": [[1, 2, 0], [3, 6, 0]]}
    for how, values in expected.items():
        torch.testing.assert_close(standardise(x, mask, how, eps=0.0),
                                   torch.tensor(values).double())


@pytest.mark.parametrize("how", ["mean-std", "rms", "none"])
def test_standardise_ignores_padding(how):
    assert torch.equal(standardise(numbers(1), MASK, how),
                       standardise(spoiled(numbers(1)), MASK, how))


@pytest.mark.parametrize("how, one", [("mean-std", 0.0), ("rms", -1.0), ("none", -5.0)])
def test_standardise_survives_a_single_token(how, one):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert not standardise(torch.full((2, 3), math.nan), mask, how).any()       # and an empty batch
    mask[1, 0] = True
    out = standardise(torch.full((2, 3), -5.0), mask, how)
    assert out[1, 0].item() == pytest.approx(one, abs=1e-5) and out.count_nonzero() <= 1


def test_standardise_of_equal_rewards_is_finite():
    assert not standardise(torch.full((4, 7), 3.0), MASK, "mean-std").abs().max() > 1e-3
    assert not standardise(torch.zeros(4, 7), MASK, "rms").any()


def test_standardise_rms_keeps_every_sign():
    x = numbers(2) + 3
    assert torch.equal(standardise(x, MASK, "rms").sign(), torch.where(MASK, x.sign(), 0.0))


def test_standardise_refuses_an_unknown_way():
    with pytest.raises(ValueError, match="mean-std, rms or none, got 'whiten'"):
        standardise(numbers(0), MASK, "whiten")


# ----- reward to go, GAE --------------------------------------------------------------------------

@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_reward_to_go_is_the_discounted_sum_of_what_follows(gamma):
    rewards = numbers(3)
    got = reward_to_go(spoiled(rewards), MASK, gamma)
    for b, length in enumerate(LENGTHS):
        for t in range(7):
            expected = sum(gamma ** (k - t) * rewards[b, k].item() for k in range(t, length))
            assert got[b, t].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gamma, lam",
                         [(1.0, 0.95), (0.9, 1.0), (0.7, 0.0), (0.0, 0.9), (0.97, 0.5)])
def test_generalised_advantage_is_the_double_sum_of_its_definition(gamma, lam):
    """A_t = sum_l (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), V = 0 behind the end."""
    rewards, values = numbers(4), numbers(5)
    advantages, returns = generalised_advantage(spoiled(rewards), spoiled(values), MASK, gamma, lam)
    for b, length in enumerate(LENGTHS):
        r, v = rewards[b].tolist(), values[b, :length].tolist() + [0.0]
        for t in range(7):
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k])
                           for k in range(t, length))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t] if t < length else 0.0,
                                                         abs=1e-12)


def test_generalised_advantage_returns_the_reward_to_go_when_lambda_is_one():
    """The values telescope away: A + V = sum_k gamma^(k-t) r_k, whatever the critic says."""
    _, returns = generalised_advantage(numbers(4), numbers(5), MASK, 0.8, 1.0)
    _, others = generalised_advantage(numbers(4), 100 * numbers(6), MASK, 0.8, 1.0)
    torch.testing.assert_close(returns, others, atol=1e-10, rtol=0)


# ----- RLOO and GRPO ------------------------------------------------------------------------------

@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_group_advantage_compares_a_response_with_the_others_to_its_prompt(method, group):
    """By their definitions, response by response; the same on every token, nothing in padding."""
    x = numbers(3)
    R = [x[b, :n].sum().item() for b, n in enumerate(LENGTHS)]
    found = group_advantage(spoiled(x), MASK, group, method)
    for b, n in enumerate(LENGTHS):
        first = b // group * group
        everyone = R[first:first + group]
        others = R[first:b] + R[b + 1:first + group]
        mean = sum(everyone) / group
        deviation = (sum((r - mean) ** 2 for r in everyone) / group) ** 0.5
        expected = (R[b] - sum(others) / len(others) if method == "rloo" else
                    (R[b] - mean) / (deviation + 1e-6))
        assert found[b].tolist() == pytest.approx([expected] * n + [0.0] * (7 - n))


def test_group_advantage_refuses_half_a_group():
    with pytest.raises(ValueError, match="a divisor of the 4 rows"):
        group_advantage(numbers(0), MASK, 3, "rloo")
