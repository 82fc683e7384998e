"""Equation (4): by hand, by a slow loop over pairs and tokens, and by finite differences."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from kernels import token_preference
from kernels.token_preference import Lengths, Options, Totals, Unchanged

OPTIONS = [Options(reduce, u0, 0.3, w) for reduce, u0, w in
           itertools.product(("sum", "mean"), ("difference", "anchor", "kept"), (0.0, 0.7))]
OPTIONS += [Options("response"), Options("share"), Options("response", "anchor", 0.3, 0.7),
            Options("sum", "anchor", 0.3, 0.7, 0.25), Options("sum", "anchor", 0.3, 0.7, 0.0)]


THREE = Lengths(torch.tensor([3, 3]), torch.tensor([3, 3]))


def problem(b=5, t1=7, t2=6, dtype=torch.float64):
    """Pair 0 has an empty U1+ (a pure deletion), pair 1 changes nothing, pair 2 has no U0.

    The sides are b, b - 1, ... tokens shorter than the tensors, at least one token long.
    """
    chosen = torch.randn(b, t1, dtype=dtype).requires_grad_()
    rejected = torch.randn(b, t2, dtype=dtype).requires_grad_()
    plus, minus = torch.rand(b, t1) < 0.4, torch.rand(b, t2) < 0.4
    plus[0], minus[0, 0] = False, True
    plus[1:2], minus[1:2] = False, False
    plus[2:3], minus[2:3] = True, True
    lengths = Lengths(*((t - torch.arange(b).flip(0)).clamp(min=1) for t in (t1, t2)))
    for mask, T in ((plus, lengths.chosen), (minus, lengths.rejected)):
        mask &= torch.arange(mask.shape[1]) < T[:, None]
    pairs = [(p, i, j) for p in range(b)
             for i, j in zip(*((~x[p, :T[p]]).nonzero()[:, 0].tolist()
                               for x, T in ((plus, lengths.chosen), (minus, lengths.rejected))))]
    return chosen, rejected, plus, minus, unchanged(pairs), lengths


def unchanged(triples):
    return Unchanged(*torch.tensor(triples, dtype=torch.int64).reshape(-1, 3).T)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def by_loop(chosen, rejected, plus, minus, u0_pairs, lengths, options):
    """The three terms by definition, one number at a time."""
    bt, token, pairs, changed = 0.0, 0.0, 0, 0
    for b in range(len(chosen)):
        up = [chosen[b, t].item() for t in range(chosen.shape[1]) if plus[b, t]]
        down = [rejected[b, t].item() for t in range(rejected.shape[1]) if minus[b, t]]
        changed += len(up) + len(down)
        token -= sum(log_sigmoid(r) for r in up) + sum(log_sigmoid(-r) for r in down)
        if up or down:
            T = lengths.chosen[b].item(), lengths.rejected[b].item()
            by = {"mean": (max(len(up), 1), max(len(down), 1)), "sum": (1, 1)}.get(
                options.reduce, T)
            if options.reduce == "response":
                up, down = chosen[b, :T[0]].tolist(), rejected[b, :T[1]].tolist()
            bt -= log_sigmoid(sum(up) / by[0] - sum(down) / by[1])
            pairs += 1
    u0 = 0.0
    for p, i, j in zip(*(x.tolist() for x in u0_pairs)):
        a, b = chosen[p, i].item(), rejected[p, j].item()
        u0 += {"difference": (a - b) ** 2, "anchor": (a ** 2 + b ** 2) / 2,
               "kept": -(log_sigmoid(a) + log_sigmoid(b)) / 2}[options.u0]
    return (options.pair_weight * bt / max(pairs, 1),
            options.u0_weight * u0 / max(len(u0_pairs.pair), 1),
            options.token_weight * token / max(changed, 1))


def test_fused_by_hand():
    """One changed token on each side, r+ = 2, r- = -1: margin 3. U0 is (0.5, 0.25), lambda is 4."""
    chosen, rejected = torch.tensor([[0.5, 2.0]]), torch.tensor([[-1.0, 0.25]])
    out = token_preference.fused(
        chosen, rejected, torch.tensor([[False, True]]), torch.tensor([[True, False]]),
        unchanged([(0, 0, 1)]), Lengths(torch.tensor([2]), torch.tensor([2])),
        Options("sum", u0_weight=4.0, token_weight=0.5))
    assert out.margin.item() == 3.0
    assert out.bt.item() == pytest.approx(math.log1p(math.exp(-3)))
    assert out.u0.item() == pytest.approx(4 * 0.0625)
    by_hand = 0.5 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert out.token.item() == pytest.approx(by_hand)
    assert out.loss.item() == pytest.approx(sum(x.item() for x in (out.bt, out.u0, out.token)))


@pytest.mark.parametrize("reduce, margin", [("sum", 3.0), ("mean", 3.0), ("share", 2 / 2 + 1 / 3),
                                            ("response", 2.5 / 2 - (-1 + 0.25 + 0.5) / 3)])
def test_margins_by_hand(reduce, margin):
    """y+ has rewards 0.5 and 2 (changed), y- has -1 (changed), 0.25 and 0.5; then padding."""
    out = token_preference.fused(
        torch.tensor([[0.5, 2.0, 9.0]]), torch.tensor([[-1.0, 0.25, 0.5]]),
        torch.tensor([[False, True, False]]), torch.tensor([[True, False, False]]), unchanged([]),
        Lengths(torch.tensor([2]), torch.tensor([3])), Options(reduce))
    assert out.margin.item() == pytest.approx(margin)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-margin)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_and_reference_equal_a_slow_loop(options):
    inputs = problem()
    expected = by_loop(*inputs, options)
    for form in (token_preference.fused, token_preference.reference):
        out = form(*inputs, options)
        assert [x.item() for x in (out.bt, out.u0, out.token)] == pytest.approx(expected, rel=1e-12)
        assert out.loss.item() == pytest.approx(sum(expected), rel=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_gradient_equals_finite_differences_and_reference(options):
    chosen, rejected, *rest = problem()
    both = chosen, rejected
    assert gradcheck(lambda a, b: token_preference.fused(a, b, *rest, options).loss, both)
    got, expected = (torch.autograd.grad(3 * form(*both, *rest, options).loss, both)
                     for form in (token_preference.fused, token_preference.reference))
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("b", [0, 1, 2])
def test_fused_is_finite_when_sides_or_pairs_are_empty(options, b):
    """b = 0: no pair. 1: a pure deletion. 2: also a pair in which nothing changed."""
    none = torch.zeros(0, dtype=torch.int64)
    chosen, rejected, plus, minus, u0, lengths = problem(b) if b else (
        torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 2, requires_grad=True),
        torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, 2, dtype=torch.bool), unchanged([]),
        Lengths(none, none))
    out = token_preference.fused(chosen, rejected, plus, minus, u0, lengths, options)
    grads = torch.autograd.grad(out.loss, (chosen, rejected))
    assert torch.isfinite(out.loss) and all(torch.isfinite(g).all() for g in grads)
    if b == 0:
        assert out.loss.item() == 0.0
    if b == 2:
        assert out.margin[1].item() == 0.0 or options.reduce == "response"
        first = [x[:1] for x in (chosen, rejected, plus, minus)]
        changed_only = token_preference.fused(*first, unchanged([]),
                                              Lengths(*(T[:1] for T in lengths)), options)
        assert out.bt.item() == changed_only.bt.item()


def test_pair_without_any_set_gives_loss_and_gradient_zero():
    chosen, rejected = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    out = token_preference.fused(chosen, rejected, nothing, nothing, unchanged([]), THREE,
                                 OPTIONS[-1])
    assert out.loss.item() == 0.0
    assert not any(g.any() for g in torch.autograd.grad(out.loss, (chosen, rejected)))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_changes_nothing(garbage, options):
    chosen, rejected, plus, minus, u0, lengths = problem()
    clean = token_preference.fused(chosen, rejected, plus, minus, u0, lengths, options)
    padding = torch.full((5, 2), garbage, dtype=torch.float64)
    nowhere = torch.zeros(5, 2, dtype=torch.bool)
    out = token_preference.fused(torch.cat([chosen, padding], 1), torch.cat([rejected, padding], 1),
                                 torch.cat([plus, nowhere], 1), torch.cat([minus, nowhere], 1),
                                 u0, lengths, options)
    for x, y in zip(out, clean):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=0)
    for x, y in zip(*(torch.autograd.grad(o.loss, (chosen, rejected)) for o in (out, clean))):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_microbatches_add_up_to_the_minibatch(options):
    chosen, rejected, plus, minus, u0, lengths = problem()
    totals = token_preference.totals_of(plus, minus, u0)
    assert totals == Totals(int((plus.any(1) | minus.any(1)).sum()),
                            int(plus.sum() + minus.sum()), len(u0.pair))
    whole = token_preference.fused(chosen, rejected, plus, minus, u0, lengths, options)
    parts = 0.0
    for s in (slice(0, 2), slice(2, 5)):
        inside = (u0.pair >= s.start) & (u0.pair < s.stop)
        part = Unchanged(u0.pair[inside] - s.start, u0.chosen[inside], u0.rejected[inside])
        parts += token_preference.fused(chosen[s], rejected[s], plus[s], minus[s], part,
                                        Lengths(*(T[s] for T in lengths)), options, totals).loss
    torch.testing.assert_close(parts, whole.loss)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=str)
def test_only_one_side_may_require_a_gradient(needs):
    chosen, rejected, *rest = problem()
    chosen, rejected = (x.detach().requires_grad_(n) for x, n in zip((chosen, rejected), needs))
    token_preference.fused(chosen, rejected, *rest).loss.backward()
    assert (chosen.grad is not None, rejected.grad is not None) == needs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    chosen, rejected, *rest = problem(dtype=dtype)
    out = token_preference.fused(chosen, rejected, *rest, OPTIONS[-1])
    exact = token_preference.reference(chosen.double(), rejected.double(), *rest, OPTIONS[-1])
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    assert [g.dtype for g in torch.autograd.grad(out.loss, (chosen, rejected))] == [dtype, dtype]


@pytest.mark.parametrize("r", [1e4, -1e4])
def test_extreme_rewards_keep_loss_and_gradient_finite(r):
    chosen, rejected = (torch.tensor([[x]], requires_grad=True) for x in (r, -r))
    on = torch.ones(1, 1, dtype=torch.bool)
    one = Lengths(torch.tensor([1]), torch.tensor([1]))
    out = token_preference.fused(chosen, rejected, on, on, unchanged([]), one,
                                 Options("sum", token_weight=1.0))
    assert out.loss.item() == pytest.approx(max(0.0, -2 * r) + max(0.0, -r))
    grads = torch.autograd.grad(out.loss, (chosen, rejected))
    assert grads[0].item() == pytest.approx(-1.5 if r < 0 else 0.0)
    assert grads[1].item() == pytest.approx(1.5 if r < 0 else 0.0)


def test_two_backward_calls_and_strided_rewards():
    chosen, rejected, *rest = problem()
    tall = chosen.detach().T.contiguous().requires_grad_()
    loss = token_preference.fused(tall.T, rejected, *rest).loss
    first = torch.autograd.grad(loss, tall, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, tall)[0], first)
    plain = token_preference.reference(chosen, rejected, *rest).loss
    expected = torch.autograd.grad(plain, chosen)[0]
    torch.testing.assert_close(first.T, expected)


def test_fused_refuses_wrong_shapes_and_unknown_options():
    chosen, rejected, plus, minus, u0, lengths = problem()
    short = Lengths(lengths.chosen[:4], lengths.rejected)
    for inputs, message in (
            ((chosen, rejected, plus[:, :6], minus, u0, lengths),
             r"plus_mask: expected bool \(5, 7\)"),
            ((chosen, rejected, plus, minus.int(), u0, lengths), "minus_mask: expected bool"),
            ((chosen, rejected[:4], plus, minus, u0, lengths), "rejected: expected B = 5"),
            ((chosen, rejected, plus, minus, u0._replace(pair=u0.pair[:-1]), lengths),
             "unchanged: expected three index tensors"),
            ((chosen, rejected, plus, minus, u0, short), r"lengths: expected \[5\]"),
            ((chosen, rejected, plus, minus, u0, lengths, Options(reduce="max")),
             "options: expected reduce")):
        with pytest.raises(ValueError, match=message):
            token_preference.fused(*inputs)
