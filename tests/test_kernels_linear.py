"""The kernels on hidden states: against their references, finite differences, matmul counts."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import exact_kl, linear_cross_entropy, linear_logp, linear_ppo, three_matmuls

# N, D, V. Rows of 1024 or 4096 logits are padded.
SMALL = [(1, 1, 1), (1, 3, 2), (37, 13, 101), (7, 5, 1031), (257, 3, 11), (7, 5, 1024)]
LARGE = [(523, 2, 4099), (523, 2, 4096)]                                  # several chunks


def problem(n, d, v, dtype=torch.float64, scale=1.0, temperature=1.0):
    """hidden and head (with gradients), targets, logp_old, advantages, the reference's two."""
    hidden = (scale * torch.randn(n, d, dtype=dtype)).requires_grad_()
    head = torch.randn(v, d, dtype=dtype).requires_grad_()
    targets = torch.randint(v, (n,))
    wide = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        logp = linear_logp.reference(hidden.double(), head.double(), targets, temperature).logp
    # log-ratios far from log(1 +- 0.2), so that rounding moves no token across the clip
    moved = torch.tensor([-0.5, -0.05, 0.05, 0.5], dtype=wide)[torch.randint(4, (n,))]
    logp_old = logp.to(wide) + moved
    return (hidden, head, targets, logp_old, torch.randn(n, dtype=wide),
            torch.randn(n, d + 1, dtype=dtype), torch.randn(v, d + 1, dtype=dtype))


def losses(module_form, temperature=1.0):
    """name -> f(problem), which returns (a scalar to differentiate, all outputs)."""
    def logp(h, w, y, old, adv, hr, wr):
        out = getattr(linear_logp, module_form)(h, w, y, temperature, True)
        return (out.logp * adv).sum(), out

    def ppo(h, w, y, old, adv, hr, wr):
        out = getattr(linear_ppo, module_form)(h, w, y, old, adv, 0.2, temperature, 2 * len(h) + 1)
        return 3 * out.loss, out

    def cross_entropy(h, w, y, old, adv, hr, wr):
        out = getattr(linear_cross_entropy, module_form)(h, w, y, adv.abs(), 5.0)
        return 3 * out.loss, out

    def kl(h, w, y, old, adv, hr, wr):
        out = getattr(exact_kl, module_form)(h, w, hr, wr, temperature)
        return (out * adv).sum(), (out,)
    return {"logp": logp, "ppo": ppo, "cross_entropy": cross_entropy, "kl": kl}


NAMES = list(losses("fused"))


@pytest.fixture(params=["one chunk", "small pieces"])
def chunking(request, monkeypatch):
    """First the shipped sizes, then chunks and tiles so small that every boundary is crossed."""
    if request.param == "small pieces":
        for name, value in (("CHUNK", (3, 3)), ("LOGITS", (40, 40)), ("COLUMNS", 4),
                            ("CACHED", 30)):
            monkeypatch.setattr(three_matmuls, name, value)
        for module in (linear_logp, exact_kl):
            monkeypatch.setattr(module, "TILE", (40, 40))
            monkeypatch.setattr(module, "TILE_ROWS", 5)


def gradients_of(scalar, inputs):
    return torch.autograd.grad(scalar, inputs, allow_unused=True)


def assert_close(got, expected, tol):
    for x, y in zip(got, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.shape == y.shape and x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size, chunking", [
    *((size, "one chunk") for size in SMALL + LARGE), *((size, "small pieces") for size in SMALL)],
    ids=str, indirect=["chunking"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_equals_reference_at_odd_sizes(name, size, temperature, chunking):
    inputs = problem(*size)
    expected, expected_out = losses("reference", temperature)[name](*inputs)
    got, got_out = losses("fused", temperature)[name](*inputs)
    assert_close(got_out, expected_out, 1e-10)
    assert_close(gradients_of(got, inputs[:2]), gradients_of(expected, inputs[:2]), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_fused_gradient_equals_finite_differences(name, chunking):
    hidden, head, *rest = problem(5, 3, 7)
    # PPO's loss has kinks, so each ratio is kept away from 1 +- eps.
    rest[1] = linear_logp.reference(hidden, head, rest[0]).logp.detach() + torch.tensor(
        [0.1, -0.1, 0.5, -0.5, 0.0], dtype=torch.float64)
    assert gradcheck(lambda h, w: losses("fused")[name](h, w, *rest)[0], (hidden, head))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)), ids=str)
def test_fused_gives_gradient_to_exactly_the_inputs_that_require_it(name, needs, chunking):
    hidden, head, *rest = problem(37, 5, 23)
    inputs = [x.detach().requires_grad_(need) for x, need in zip((hidden, head), needs)]
    got, _ = losses("fused")[name](*inputs, *rest)
    assert got.requires_grad == any(needs)
    if any(needs):
        expected, _ = losses("reference")[name](*inputs, *rest)
        asked = [x for x in inputs if x.requires_grad]
        assert_close(gradients_of(got, asked), gradients_of(expected, asked), 1e-10)
        got, _ = losses("fused")[name](*inputs, *rest)
        got.backward()
        assert [x.grad is not None for x in inputs] == list(needs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_is_as_close_to_float32_as_the_plain_form_in_half_precision(name, dtype, monkeypatch):
    """|fused - float32| <= |plain - float32| + tolerance, in the 2-norm, over several chunks."""
    monkeypatch.setattr(three_matmuls, "LOGITS", (0, 0))                      # three chunks of 256
    hidden, head, y, old, adv, hr, wr = problem(599, 64, 307, dtype, scale=0.3, temperature=0.7)

    def run(form, cast):
        inputs = [cast(x.detach()) for x in (hidden, head, hr, wr)]
        inputs[:2] = [x.requires_grad_() for x in inputs[:2]]
        loss, out = losses(form, 0.7)[name](inputs[0], inputs[1], y, old, adv, *inputs[2:])
        return [x.detach().float() for x in (*out, *gradients_of(loss, inputs[:2]))]

    exact = run("reference", torch.Tensor.float)
    for got, plain, true in zip(run("fused", lambda x: x), run("reference", lambda x: x), exact):
        # A scalar has only one rounding error, so its tolerance is wider.
        slack = 0.1 * (plain - true).norm() + (2e-3 if true.ndim else 2e-2) * true.norm() + 1e-6
        assert (got - true).norm() <= (plain - true).norm() + slack


@pytest.mark.parametrize("name", NAMES)
def test_fused_is_finite_in_float16_when_the_vocabulary_exceeds_its_range(name):
    """Equal logits over 70,000 tokens: the sum of exponentials exceeds float16's 65,504."""
    hidden, head, y, old, adv, hr, wr = problem(3, 2, 70_000, torch.float16)
    with torch.no_grad():
        hidden *= 0
    loss, _ = losses("fused")[name](hidden, head, y, old, adv, hr, wr)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients_of(loss, (hidden, head)))


@pytest.mark.parametrize("name", NAMES)
def test_fused_equals_reference_on_extreme_logits(name, chunking):
    """Logits up to +-1e4: probabilities underflow to 0, log-probabilities stay finite."""
    hidden, head, y, old, adv, hr, wr = problem(11, 2, 13)
    with torch.no_grad():
        hidden *= 1e4 / (hidden @ head.T).abs().max()
        old.copy_(linear_logp.reference(hidden, head, y).logp + 0.1)
    inputs = hidden, head, y, old, adv, hr, wr
    expected, expected_out = losses("reference")[name](*inputs)
    got, got_out = losses("fused")[name](*inputs)
    assert linear_logp.fused(*inputs[:3]).logp.min() < -1000
    for x, true in zip(got_out, expected_out):
        torch.testing.assert_close(x, true, rtol=1e-9, atol=1e-9)
    assert all(torch.isfinite(x).all() for x in gradients_of(got, inputs[:2]))
    got, _ = losses("fused")[name](*inputs)
    assert_close(gradients_of(got, inputs[:2]), gradients_of(expected, inputs[:2]), 1e-7)


def test_fused_logp_is_finite_in_float32_when_the_probability_is_zero():
    hidden, head = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0]])
    out = linear_logp.fused(hidden, head, torch.tensor([1]), entropy=True)
    assert out.logp.item() == pytest.approx(-2e4, rel=1e-6)
    assert out.entropy.item() == 0.0 and out.logsumexp.item() == pytest.approx(1e4, rel=1e-6)


def test_fused_logp_by_hand():
    """Logits 0, ln 2, ln 5 at temperature 1: probabilities 1/8, 2/8, 5/8."""
    hidden, head = torch.ones(1, 1), torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    out = linear_logp.fused(hidden, head, torch.tensor([2]), entropy=True)
    assert out.logp.item() == pytest.approx(math.log(5 / 8), abs=1e-6)
    assert out.logsumexp.item() == pytest.approx(math.log(8), abs=1e-6)
    plogp = 1 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8)
    assert out.entropy.item() == pytest.approx(-plogp, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_fused_takes_views_of_any_stride(name):
    hidden, head, y, old, adv, hr, wr = problem(37, 10, 23)
    hidden = hidden.detach().T.contiguous().T.requires_grad_()               # column-major
    wide_head = head.detach().repeat_interleave(2, 1).requires_grad_()       # every other column
    adv = adv.repeat_interleave(3)[::3]
    views = hidden, wide_head[:, ::2], y.repeat_interleave(2)[::2], old, adv, hr, wr
    assert not any(x.is_contiguous() for x in views[:3])
    expected, _ = losses("reference")[name](*views)
    got, _ = losses("fused")[name](*views)
    assert_close([got], [expected], 1e-10)
    leaves = hidden, wide_head
    assert_close(gradients_of(got, leaves), gradients_of(expected, leaves), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_fused_of_no_tokens_is_zero_with_zero_gradients(name):
    inputs = problem(0, 3, 7)
    got, _ = losses("fused")[name](*inputs)
    assert got.item() == 0.0
    for x, grad in zip(inputs, gradients_of(got, inputs[:2])):
        assert grad.shape == x.shape and not grad.any()


def test_cross_entropy_mask_equals_selection_and_full_mask_equals_none():
    hidden, head, y, *_ = problem(37, 5, 23)
    mask = torch.rand(37) < 0.5
    masked = linear_cross_entropy.fused(hidden, head, y, mask).loss
    selected = linear_cross_entropy.fused(hidden[mask], head, y[mask]).loss
    torch.testing.assert_close(masked, selected)
    everything = linear_cross_entropy.fused(hidden, head, y, torch.ones(37, dtype=torch.bool)).loss
    torch.testing.assert_close(everything, torch.nn.functional.cross_entropy(hidden @ head.T, y))
    nothing = linear_cross_entropy.fused(hidden, head, y, torch.zeros(37, dtype=torch.bool)).loss
    assert nothing.item() == 0.0 and not any(g.any() for g in gradients_of(nothing, (hidden, head)))


def test_ppo_loss_of_microbatches_adds_up_to_the_minibatch():
    hidden, head, y, old, adv, *_ = problem(37, 5, 23)
    whole = linear_ppo.fused(hidden, head, y, old, adv, 0.2)
    parts = [linear_ppo.fused(hidden[s], head, y[s], old[s], adv[s], 0.2, denominator=37)
             for s in (slice(0, 11), slice(11, 12), slice(12, 37))]
    for name in ("loss", "clip_fraction", "kl_k1", "kl_k3", "entropy"):
        torch.testing.assert_close(sum(getattr(p, name) for p in parts), getattr(whole, name))
    expected = gradients_of(whole.loss, (hidden, head))
    assert_close(gradients_of(sum(p.loss for p in parts), (hidden, head)), expected, 1e-10)


def test_ppo_under_no_grad_has_the_same_loss_and_no_entropy():
    hidden, head, y, old, adv, *_ = problem(37, 5, 23)
    with torch.no_grad():
        out = linear_ppo.fused(hidden, head, y, old, adv, 0.2)
    assert not out.loss.requires_grad and torch.isnan(out.entropy)
    with_gradient = linear_ppo.fused(hidden, head, y, old, adv, 0.2).loss
    torch.testing.assert_close(out.loss, with_gradient.detach())


def test_exact_kl_of_equal_models_is_exactly_zero(chunking):
    hidden, head, *_ = problem(37, 5, 23, torch.float32)
    assert not exact_kl.fused(hidden, head, hidden, head, 0.7).any()


@pytest.mark.parametrize("name", NAMES)
def test_fused_accumulates_into_a_head_tied_to_the_embedding(name):
    """One tensor is embedding and head. Its gradient is the sum over both uses and two losses."""
    head, y, old, adv, hr, wr = problem(37, 5, 23)[1:]
    ids = torch.randint(23, (37,))

    def grad(form):
        table = head.detach().clone().requires_grad_()
        for _ in range(2):
            hidden = torch.nn.functional.embedding(ids, table)
            losses(form)[name](hidden, table, y, old, adv, hr, wr)[0].backward()
        return table.grad
    torch.testing.assert_close(grad("fused"), grad("reference"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_second_backward_repeats_the_gradient(name):
    inputs = problem(7, 3, 5)
    loss, _ = losses("fused")[name](*inputs)
    first = [x.clone() for x in torch.autograd.grad(loss, inputs[:2], retain_graph=True)]
    assert_close(torch.autograd.grad(loss, inputs[:2]), first, 0)


@pytest.mark.parametrize("name", NAMES)
def test_second_backward_is_refused_without_retain_graph(name):
    loss, _ = losses("fused")[name](*problem(7, 3, 5))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("name", ["ppo", "cross_entropy"])
def test_first_backward_returns_the_gradients_without_a_copy(name):
    """The tensor that the forward pass filled becomes .grad; [V, D] is never copied."""
    hidden, head, *rest = problem(7, 3, 5)
    out = (linear_ppo.fused(hidden, head, *rest[:3], 0.2).loss if name == "ppo" else
           linear_cross_entropy.fused(hidden, head, rest[0]).loss)
    made = out.grad_fn.made[1].data_ptr()
    out.backward()
    assert head.grad.data_ptr() == made


class Matmuls(TorchDispatchMode):
    """Counts the work of all matmuls, whole or in pieces, in units of 2 N D V operations."""

    def __init__(self, unit):
        super().__init__()
        self.unit, self.flops, self.largest = unit, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif any(word in str(func) for word in ("bmm", "matmul", "linear", "einsum", "dot")):
            raise AssertionError(f"{func} is not counted")
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out

    @property
    def count(self):
        return self.flops / self.unit


@pytest.mark.parametrize("name, forward, total", [
    ("logp", 1, 4), ("ppo", 3, 3), ("cross_entropy", 3, 3), ("kl", 2, 6)])
def test_fused_matmul_count_and_no_tensor_beyond_a_chunk(name, forward, total, monkeypatch):
    """On a CPU the backward pass runs in the calling thread, so one mode counts both passes."""
    monkeypatch.setattr(three_matmuls, "LOGITS", (0, 0))                      # chunks of 256
    n, d, v = 1024, 8, 701
    inputs = problem(n, d, v)
    inputs = *inputs[:5], inputs[5][:, :d].contiguous(), inputs[6][:, :d].contiguous()
    with Matmuls(2 * n * d * v) as seen:
        loss, _ = losses("fused")[name](*inputs)
        assert seen.count == forward
        loss.backward()
    assert seen.count == total
    assert seen.largest <= max(256 * v, three_matmuls.LOGITS[0], linear_logp.TILE_ROWS * 512)
    with torch.no_grad(), Matmuls(2 * n * d * v) as seen:
        losses("fused")[name](*inputs)
    assert seen.count == (2 if name == "kl" else 1)


def test_fused_refuses_shapes_that_do_not_fit():
    hidden, head, y, old, adv, *_ = problem(7, 3, 5)
    with pytest.raises(ValueError, match=r"targets: expected \(N,\) = \(7,\), got \(6,\)"):
        linear_logp.fused(hidden, head, y[:6])
    with pytest.raises(ValueError, match="logp_old: expected"):
        linear_ppo.fused(hidden, head, y, old[:6], adv, 0.2)
    with pytest.raises(ValueError, match=r"expected \(N, D\) and \(V, D\)"):
        linear_cross_entropy.fused(hidden, head[:, :2], y)
    with pytest.raises(ValueError, match="one floating dtype"):
        linear_logp.fused(hidden.float(), head, y)
    with pytest.raises(ValueError, match="temperature: expected > 0, got 0"):
        linear_logp.fused(hidden, head, y, 0)
    with pytest.raises(ValueError, match="hidden_ref, head_ref: expected N, V = 7, 5"):
        exact_kl.fused(hidden, head, hidden, head[:4])


def test_head_gradient_of_many_chunks_is_as_exact_as_that_of_one_in_half_precision(monkeypatch):
    """64 chunks whose sums were rounded to bfloat16 each time would be several times worse."""
    draw = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 16, generator=draw).bfloat16() for n in (512, 40))
    targets = torch.randint(40, (512,), generator=draw)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        weight = head.to(dtype, copy=True).requires_grad_()
        linear_cross_entropy.fused(hidden.to(dtype), weight, targets).loss.backward()
        return weight.grad.double()
    exact = gradient(torch.float64)
    error = lambda: (gradient(torch.bfloat16) - exact).norm()
    whole = error()
    monkeypatch.setattr(three_matmuls, "CHUNK", (8, 8))
    monkeypatch.setattr(three_matmuls, "LOGITS", (0, 0))
    assert error() < 2 * whole
