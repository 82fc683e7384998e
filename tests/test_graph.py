"""Steps of fixed shape draw the same responses as `sample`, and can be captured.

No GPU is needed. A CUDA graph relies on one property: the operations of one step, repeated on the
same tensors, are the next step. Here a recorder records these operations and a loop repeats them.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fgrlhf.engine import graph, lora
from fgrlhf.engine.graph import Decoder, sample_by_graph
from fgrlhf.model import KVCache
from fgrlhf.rollout import choose, lay_out, prefill, sample
from tests.small import ids, llama

EOS = 2
PROMPTS = [ids(4, 1), ids(1, 2), ids(7, 3), ids(2, 4), ids(3, 5), ids(7, 6), ids(1, 7), ids(5, 8)]
ASK = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "unique", "masked_select")


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_graph(policy, prompts, eos, T, temperature=1.0, seed=3):
    """Calls `sample_by_graph` with the random numbers of `sample`."""
    tokens, lengths = lay_out(prompts, T, policy.config.max_seq_len, "cpu")
    uniform = torch.rand(len(prompts), T, generator=generator(seed), dtype=torch.float64)
    uniform = uniform[:, :tokens.shape[1] - int(lengths.max())]
    return sample_by_graph(policy, tokens, lengths, uniform, eos, temperature)


def decoder(policy, T=6, prompts=PROMPTS) -> tuple[Decoder, torch.Tensor]:
    """Returns a prefilled decoder, and the hidden states to start from."""
    tokens, lengths = lay_out(prompts, T, policy.config.max_seq_len, "cpu")
    cache = KVCache(policy.config, len(prompts), tokens.shape[1], dtype=policy.head.dtype)
    hidden = prefill(policy, tokens, lengths, torch.arange(len(prompts)), cache)
    uniform = torch.rand(len(prompts), T, generator=generator(), dtype=torch.float64)
    return Decoder(policy, cache, lengths, uniform, lambda x, u: choose(x, u, 0.8)), hidden.detach()


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.7])
@pytest.mark.parametrize("prompts", [PROMPTS * 3, [ids(4, 1)], [ids(3, i) for i in range(5)]])
def test_sample_by_graph_draws_the_tokens_and_logp_of_sample(temperature, prompts):
    """Three batches: unequal prompts with early and no ends; one row; equal prompts."""
    policy = llama(dtype=torch.float64)
    plain = sample(policy, prompts, EOS, 20, temperature, generator())
    fixed = by_graph(policy, prompts, EOS, 20, temperature)
    assert all(torch.equal(a, b) for a, b in zip(plain.sequences, fixed.sequences))
    assert torch.equal(plain.truncated, fixed.truncated)
    assert fixed.logp_old.shape == plain.logp_old.shape
    torch.testing.assert_close(fixed.logp_old, plain.logp_old, rtol=0, atol=1e-12)
    if len(prompts) == 24 and temperature:
        assert len(set(plain.sequences.response_lengths.tolist())) > 5
        assert 0 < int(plain.truncated.sum()) < 24


def test_sample_by_graph_keeps_to_the_context_and_to_one_token():
    policy = llama(dtype=torch.float64)                             # of context 40
    for prompts, T in ([ids(37, 1), ids(5, 2)], 20), (PROMPTS, 1):
        plain, fixed = sample(policy, prompts, -1, T, 1.0, generator()), by_graph(
            policy, prompts, -1, T)
        assert all(torch.equal(a, b) for a, b in zip(plain.sequences, fixed.sequences))
        assert plain.truncated.all() and fixed.truncated.all()


def test_sample_by_graph_draws_the_same_with_adapters_and_in_float32():
    policy = lora.adapt(llama(), 2)
    with torch.no_grad():
        for b in (p for name, p in lora.adapters(policy).items() if name.endswith("lora_b")):
            b.normal_(0, 0.3, generator=generator())
    plain, fixed = sample(policy, PROMPTS, EOS, 12, 1.0, generator()), by_graph(
        policy, PROMPTS, EOS, 12)
    assert torch.equal(plain.sequences.tokens, fixed.sequences.tokens)
    torch.testing.assert_close(fixed.logp_old, plain.logp_old, rtol=0, atol=1e-5)


def test_run_stops_soon_after_every_row_has_ended(monkeypatch):
    """It checks at t = 16, 32, ..., so rows whose first token is EOS cost 15 steps of 30."""
    made, steps = decoder(llama(), T=30)
    monkeypatch.setattr(made, "draw", lambda logits, u: (torch.full((8,), EOS), u.float()))
    step = made.step
    monkeypatch.setattr(made, "step", lambda: steps_done.append(1) or step())
    steps_done: list[int] = []
    drawn = made.run(steps, EOS)
    assert len(steps_done) == graph.LOOK - 1 and drawn.lengths.tolist() == [1] * 8
    assert not drawn.truncated.any() and not drawn.tokens[:, 1:].any()


class Recorder(TorchDispatchMode):
    """Records every operation with its arguments and its result."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, result))
        return result


def recorded(made: Decoder) -> list[tuple]:
    with torch.no_grad(), Recorder() as recorder:
        made.step()
    return recorder.done


def described(operations: list[tuple]) -> list[str]:
    """Describes operations; tensors are replaced by their shapes, strides and dtypes."""
    about = lambda x: ((tuple(x.shape), x.stride(), x.storage_offset(), x.dtype)
                       if isinstance(x, torch.Tensor) else x)
    return [f"{function} {tree_map(about, (args, kwargs, result))}"
            for function, args, kwargs, result in operations]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_asks_the_device_nothing_and_is_the_same_operations_each_time(dtype):
    made, hidden = decoder(llama(dtype=dtype))
    with torch.no_grad():
        made.put(hidden)
    places = [x.data_ptr() for x in (*made.state(), made.drawn, made.logp, made.cache.keys)]
    steps = [described(recorded(made)) for _ in range(5)]
    assert all(step == steps[0] for step in steps) and len(steps[0]) > 50
    assert not [name for name in steps[0] if any(word in name.split()[0] for word in ASK)]
    assert places == [x.data_ptr() for x in (*made.state(), made.drawn, made.logp,
                                             made.cache.keys)]


def test_operations_of_the_dynamic_path_change_from_step_to_step():
    """The recorder finds the difference that the test above looks for."""
    policy, cache = llama(), KVCache(llama().config, 1, 8)
    steps = []
    for _ in range(2):
        with torch.no_grad(), Recorder() as recorder:
            policy.hidden(torch.tensor([[5]]), cache=cache)
        steps.append(described(recorder.done))
    assert steps[0] != steps[1]


def replay(operations: list[tuple]) -> None:
    """Repeats recorded operations on the same tensors, into the same results."""
    for function, args, kwargs, result in operations:
        again = function(*args, **kwargs)
        for old, new in zip(*((x if isinstance(x, (tuple, list)) else [x])
                              for x in (result, again))):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """Replaces a CUDA graph: keeps the operations of a capture, and repeats them."""

    def replay(self):
        replay(self.operations)


def test_captured_draws_the_same_when_its_operations_are_replayed(monkeypatch):
    """Runs `captured` with a recorder instead of CUDA. The warm-up must not change the result."""
    policy = llama(dtype=torch.float64)
    (plain, hidden), (made, _) = decoder(policy, T=9), decoder(policy, T=9)
    expected = plain.run(hidden, -1)

    @contextlib.contextmanager
    def capture(graph):
        before = [x.clone() for x in made.state()]
        with Recorder() as recorder:
            yield
        graph.operations = recorder.done
        for x, was in zip(made.state(), before):
            x.copy_(was)
    for name, fake in {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph,
                       "stream": contextlib.nullcontext, "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with torch.no_grad():
        made.put(hidden)
        step = made.captured()
        for _ in range(8):
            step()
    assert torch.equal(made.drawn, expected.tokens)
    torch.testing.assert_close(made.logp, expected.logp, rtol=0, atol=1e-12)


def test_sample_on_a_cpu_takes_no_steps_of_fixed_shape(monkeypatch):
    monkeypatch.setattr(graph, "sample_by_graph", lambda *arguments: 1 / 0)
    assert len(sample(llama(), PROMPTS, EOS, 3, 1.0, generator()).truncated) == 8
