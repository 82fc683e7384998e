"""Equation (7) and the critic's loss by hand and by autograd; the method's optimum on a table."""

import math

import pytest
import torch

from fgrlhf.advantage import penalise_kl, standardise
from fgrlhf.baseline import value_loss
from fgrlhf.ppo import check_first_ratio, kl_estimates, policy_loss
from fgrlhf.rollout import sample
from kernels import linear_ppo
from tests.small import gradients, ids, llama, ragged


def numbers(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----- the policy's loss --------------------------------------------------------------------------

def test_policy_loss_equals_equation_7_written_with_full_logits():
    """Loss, gradient and statistics against a double loop over rows and tokens, in float64."""
    policy, batch, temperature, eps = llama(dtype=torch.float64), ragged(), 0.7, 0.2
    T = int(batch.response_lengths.max())
    shift, advantages = 0.3 * numbers((4, T), 1), numbers((4, T), 2)
    total, count, over, k3, entropy, logp_old = 0.0, 0, 0, 0.0, 0.0, torch.zeros(4, T).double()
    logits = policy(batch.tokens) / temperature
    for b in range(4):
        for t in range(int(batch.response_lengths[b])):
            at = int(batch.prompt_lengths[b]) + t
            logp = logits[b, at - 1].log_softmax(0)
            logp_old[b, t] = logp[batch.tokens[b, at]].detach() - shift[b, t]
            ratio = (logp[batch.tokens[b, at]] - logp_old[b, t]).exp()
            free, bound = ratio * advantages[b, t], ratio.clamp(1 - eps, 1 + eps) * advantages[b, t]
            total, count = total - torch.minimum(free, bound), count + 1
            over += abs(ratio.item() - 1) > eps
            k3 += ratio.item() - 1 - math.log(ratio.item())
            entropy -= (logp.exp() * logp).sum().item()
    (total / count).backward()
    expected = gradients(policy)
    out = policy_loss(policy, batch, logp_old, advantages, eps, temperature, count)
    out.loss.backward()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    assert out.loss.item() == pytest.approx(total.item() / count)
    assert out.clip_fraction.item() == pytest.approx(over / count) and 0 < over < count
    assert out.kl_k3.item() == pytest.approx(k3 / count)
    assert out.entropy.item() == pytest.approx(entropy / count)


def test_policy_gradient_at_ratio_one_is_the_reinforce_gradient():
    """-1/N sum A_t grad logp_t: before the first update nothing is clipped."""
    policy, batch = llama(dtype=torch.float64), ragged((2,), (3,))
    advantages = torch.tensor([[1.0, -2.0, 0.5]]).double()
    logp = policy(batch.tokens).log_softmax(-1)
    logp = torch.stack([logp[0, 1 + t, batch.tokens[0, 2 + t]] for t in range(3)])
    (-(advantages[0] * logp).sum() / 3).backward()
    expected = gradients(policy)
    policy_loss(policy, batch, logp.detach()[None], advantages, 0.2, 1.0, 3).loss.backward()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


# ----- the critic's loss --------------------------------------------------------------------------

def test_value_loss_by_hand():
    """V 1, old 0, eps .2. G = 0: unclipped 1 beats clipped .04. G = 2: clipped, (.2 - 2)^2."""
    args = [torch.tensor([[1.0, 1.0, 9.0]]), torch.zeros(1, 3), torch.tensor([[0.0, 2.0, 0.0]]),
            torch.tensor([[True, True, False]])]
    assert value_loss(*args, clip_eps=0.2,
                      denominator=2).item() == pytest.approx(0.5 * (1 + 3.24) / 2)


def test_value_loss_pulls_unclipped_values_to_the_returns():
    values = torch.tensor([[0.1, -0.1]], requires_grad=True)
    value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.2,
               2).backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.45, -0.55]]))            # (V - G) / 2


# ----- statistics ---------------------------------------------------------------------------------

def test_kl_estimates_by_hand():
    """log r = log_ref - logp = 0 and log 2: k1 = -log 2 / 2, k3 = (2 - 1 - log 2) / 2."""
    found = kl_estimates(torch.tensor([[-1.0, -1.0, 5.0]]),
                         torch.tensor([[-1.0, -1.0 + math.log(2), 0.0]]),
                         torch.tensor([[True, True, False]]))
    assert found["kl_k1"] == pytest.approx(-math.log(2) / 2)
    assert found["kl_k3"] == pytest.approx((1 - math.log(2)) / 2)


def test_kl_estimates_are_unbiased():
    """Both means over samples of pi meet the exact KL(pi || ref) within 4 standard errors."""
    p, q = numbers(6, 1).log_softmax(0), numbers(6, 2).log_softmax(0)
    exact = (p.exp() * (p - q)).sum().item()
    n = 50_000
    drawn = torch.multinomial(p.exp(), n, replacement=True,
                              generator=torch.Generator().manual_seed(0))
    found = kl_estimates(p[drawn][None], q[drawn][None], torch.ones(1, n, dtype=torch.bool))
    log_r = (q - p)[drawn]
    for name, terms in (("kl_k1", -log_r), ("kl_k3", log_r.exp() - 1 - log_r)):
        assert abs(found[name] - exact) < 4 * terms.std().item() / n ** 0.5
        assert terms.mean().item() == pytest.approx(found[name])


# ----- rule 2's alarm -----------------------------------------------------------------------------

def test_check_first_ratio_passes_equal_and_stops_different_logps():
    logp = torch.tensor([-1.0, -2.0])
    assert check_first_ratio(logp, logp) == 0
    assert check_first_ratio(logp, logp + 5e-4) == pytest.approx(5e-4, rel=1e-3)
    for other in (logp + 2e-3, logp * math.nan, torch.tensor([-1.0, -math.inf])):
        with pytest.raises(FloatingPointError, match="ratio on the first minibatch"):
            check_first_ratio(logp, other)


# ----- the optimum --------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["none", "rms"])
def test_fine_grained_ppo_converges_to_the_tilted_reference_on_a_table(how):
    """At gamma = 0 the optimum of every state is ref * exp(r / beta) / Z.

    The policy is a table of logits, state by token: hidden states are one-hot, the head is the
    table. The loop is the method's: sample, (5), (6), two clipped updates. A reward shifted by a
    constant in each state has the same optimum; shifted by -beta log Z_s, r~ is 0 there, and
    sampling noise dies out.
    """
    states, V, beta, n = 4, 5, 0.7, 2000
    ref, r = numbers((states, V), 1).log_softmax(-1), numbers((states, V), 2)
    target = (ref + r / beta).log_softmax(-1)
    r = r - beta * (ref + r / beta).logsumexp(-1, keepdim=True)
    table = ref.T.clone().requires_grad_()                                           # [V, states]
    optimizer = torch.optim.Adam([table], lr=0.1)
    draw = torch.Generator().manual_seed(0)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        state = torch.randint(states, (n,), generator=draw)
        logp = table.detach().T.log_softmax(-1)[state]                               # [n, V]
        token = torch.multinomial(logp.exp(), 1, generator=draw)
        mask = torch.ones_like(token, dtype=torch.bool)
        logp_old, logp_ref = logp.gather(1, token), ref[state].gather(1, token)      # [n, 1]
        penalised = penalise_kl(r[state].gather(1, token), logp_old, logp_ref, mask, beta)
        advantages = standardise(penalised, mask, how)
        for _ in range(2):
            out = linear_ppo.fused(torch.nn.functional.one_hot(state, states).double(), table,
                                   token[:, 0],
                                   logp_old[:, 0], advantages[:, 0], clip_eps=0.2)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = table.detach().T.softmax(-1)
    assert (ref.exp() - target.exp()).abs().max() > 0.3                         # it had a way to go
    assert (found - target.exp()).abs().max() < (1e-3 if how == "none" else 2e-2)


def test_first_minibatch_ratio_is_one_for_rollouts_of_unequal_length():
    policy = llama()
    rollout = sample(policy, [ids(n, n) for n in (1, 4, 2, 7)], 2, 15, 0.8,
                     torch.Generator().manual_seed(0))
    mask = rollout.sequences.response_mask
    out = policy_loss(policy, rollout.sequences, rollout.logp_old,
                      torch.ones_like(rollout.logp_old), 0.2, 0.8,
                      int(mask.sum()))
    assert check_first_ratio(out.logp, rollout.logp_old[mask]) < 1e-5
    assert out.clip_fraction == 0 and abs(out.loss.item() + 1) < 1e-5
