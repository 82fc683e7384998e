"""The clipped loss on given log-probabilities: by hand, against the reference, with masks."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from kernels import clipped_surrogate


def problem(*shape, dtype=torch.float64):
    logp = torch.randn(*shape, dtype=dtype).requires_grad_()
    return logp, logp.detach() + torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)


def test_fused_by_hand():
    """Ratios 2, 2, 1/2, 1/2, 1 and advantages +, -, +, -, +: the first and fourth are clipped."""
    ratio = torch.tensor([2.0, 2.0, 0.5, 0.5, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0], dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    out = clipped_surrogate.fused(logp, torch.zeros(5, dtype=torch.float64), advantages, 0.2)
    assert out.loss.item() == pytest.approx(-(1.2 - 2.0 + 0.5 - 0.8 + 3.0) / 5)
    assert out.clip_fraction.item() == pytest.approx(4 / 5)
    assert out.kl_k1.item() == pytest.approx(0.0)              # -(2 log 2 - 2 log 2 + 0) / 5
    assert out.kl_k3.item() == pytest.approx((1 + 1 - 0.5 - 0.5 + 0) / 5)
    out.loss.backward()
    expected = -torch.tensor([0.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64) / 5
    torch.testing.assert_close(logp.grad, expected)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 11)], ids=str)
@pytest.mark.parametrize("kind", ["none", "some", "full"])
def test_fused_equals_reference(shape, kind):
    logp, old, adv = problem(*shape)
    mask = {"none": None, "some": torch.rand(shape) < 0.6,
            "full": torch.ones(shape, dtype=torch.bool)}[kind]
    got = clipped_surrogate.fused(logp, old, adv, 0.2, mask)
    expected = clipped_surrogate.reference(logp, old, adv, 0.2, mask)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(*(torch.autograd.grad(2 * o.loss, logp)[0] for o in (got, expected)))


def test_fused_gradient_equals_finite_differences():
    logp, old, adv = problem(3, 5)
    off_the_kinks = torch.tensor([0.5, -0.5, 0.1, -0.1, 0.0], dtype=torch.float64)
    old = logp.detach() + off_the_kinks
    mask = torch.rand(3, 5) < 0.7
    assert gradcheck(lambda x: clipped_surrogate.fused(x, old, adv, 0.2, mask, 7).loss, (logp,))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_masked_entries_change_nothing(garbage):
    logp, old, adv = problem(4, 6)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 0])[:, None]
    clean = clipped_surrogate.fused(logp, old, adv, 0.2, mask)
    dirty = [torch.where(mask, x, garbage) for x in (logp, old, adv)]
    out = clipped_surrogate.fused(*dirty, 0.2, mask)
    for x, y in zip(out, clean):
        assert torch.equal(x, y)
    got, expected = (torch.autograd.grad(o.loss, logp)[0] for o in (out, clean))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(0,), (3, 4)], ids=str)
def test_fused_is_zero_with_zero_gradient_when_nothing_is_unmasked(shape):
    logp, old, adv = problem(*shape)
    out = clipped_surrogate.fused(logp, old, adv, 0.2, torch.zeros(shape, dtype=torch.bool))
    assert [x.item() for x in out] == [0, 0, 0, 0]
    assert not torch.autograd.grad(out.loss, logp)[0].any()


def test_microbatches_add_up_to_the_minibatch():
    logp, old, adv = problem(8, 5)
    mask = torch.rand(8, 5) < 0.6
    whole = clipped_surrogate.fused(logp, old, adv, 0.2, mask)
    parts = [clipped_surrogate.fused(logp[s], old[s], adv[s], 0.2, mask[s], int(mask.sum()))
             for s in (slice(0, 1), slice(1, 8))]
    for name in clipped_surrogate.Surrogate._fields:
        torch.testing.assert_close(sum(getattr(p, name) for p in parts), getattr(whole, name))


def test_half_precision_is_computed_in_float32():
    logp, old, adv = problem(64, dtype=torch.bfloat16)
    out = clipped_surrogate.fused(logp, old, adv, 0.2)
    exact = clipped_surrogate.reference(logp.double(), old.double(), adv.double(), 0.2)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    assert torch.autograd.grad(out.loss, logp)[0].dtype == torch.bfloat16


def test_two_backward_calls_give_the_same_gradient():
    logp, old, adv = problem(5)
    loss = clipped_surrogate.fused(logp, old, adv, 0.2).loss
    first = torch.autograd.grad(loss, logp, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, logp)[0], first)


def test_extreme_log_ratios_stay_finite_when_they_are_clipped():
    """rho = e^80 with A > 0 is clipped: the loss is -1.2 A and the gradient 0."""
    logp = torch.tensor([0.0, -1e4], requires_grad=True)
    out = clipped_surrogate.fused(logp, torch.tensor([-80.0, 0.0]), torch.tensor([1.0, 1.0]), 0.2)
    assert out.loss.item() == pytest.approx(-0.6)
    assert not torch.autograd.grad(out.loss, logp)[0].any() and math.isfinite(out.kl_k1.item())


def test_fused_refuses_shapes_that_differ():
    logp, old, adv = problem(3, 4)
    with pytest.raises(ValueError, match=r"advantages: expected .* \(3, 4\), got \(3, 3\)"):
        clipped_surrogate.fused(logp, old, adv[:, :3], 0.2)
