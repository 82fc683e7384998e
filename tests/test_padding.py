"""Right-padded batches computed without their padding: the same numbers from fewer rows."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fgrlhf.engine.lora import adapt, adapters
from fgrlhf.model import Padding
from tests.small import gradients, llama, ragged, with_garbage

LENGTHS = torch.tensor([3, 1, 5, 2])


def test_strip_takes_the_real_tokens_row_after_row():
    padding = Padding(LENGTHS, 6)
    x = torch.arange(24).view(4, 6)
    assert padding.strip(x).tolist() == [[0, 1, 2, 6, 12, 13, 14, 15, 16, 18, 19]]
    assert padding.positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1]]


def test_restore_puts_them_back_and_sets_the_padding_to_0():
    padding, x = Padding(LENGTHS, 6), torch.randn(4, 6, 3)
    real = (torch.arange(6) < LENGTHS[:, None])[..., None]
    assert torch.equal(padding.restore(padding.strip(x)), torch.where(real, x, 0.0))


@pytest.mark.parametrize("shape, move", [((4, 6, 2), Padding.strip), ((1, 11, 2), Padding.restore)])
def test_strip_and_restore_are_each_others_gradients(shape, move):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: move(Padding(LENGTHS, 6), x), x)


def both(model, batch):
    """Yields hidden states and all gradients: first with padding, then without."""
    real = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    weights = torch.randn(16, dtype=torch.float64)
    for more in ({}, {"lengths": batch.lengths}):
        hidden = model.hidden(batch.tokens, **more)
        (hidden[real].tanh() @ weights).sum().backward()
        yield hidden.detach(), gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_hidden_states_and_gradients_are_those_of_the_padded_batch(rank, checkpointing):
    model, batch = llama(dtype=torch.float64), with_garbage(ragged(), more=3)
    if rank:
        model = adapt(model, rank)
        for part in adapters(model).values():
            part.data.normal_()
    model.activation_checkpointing = checkpointing
    (padded, expected), (hidden, found) = both(model, batch)
    real = (torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None])[..., None]
    torch.testing.assert_close(hidden, torch.where(real, padded, 0.0), atol=1e-12, rtol=1e-12)
    assert found.keys() == expected.keys() and len(found) > 4
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-11, rtol=1e-11)


def test_a_batch_without_padding_is_computed_unchanged():
    model, tokens = llama(), torch.randint(3, 24, (3, 7))
    assert torch.equal(model.hidden(tokens, lengths=torch.full((3,), 7)), model.hidden(tokens))


def test_hidden_refuses_lengths_together_with_positions():
    tokens = torch.randint(3, 24, (3, 7))
    with pytest.raises(ValueError, match="lengths: expected without positions"):
        llama().hidden(tokens, torch.arange(7)[None], lengths=torch.tensor([7, 3, 2]))


class Rows(TorchDispatchMode):
    """Records the number of rows of every matmul."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.seen.add(len(args[0]))
        return function(*args, **(kwargs or {}))


def test_no_matmul_of_the_trunk_computes_padding():
    model, batch = llama(), ragged()
    with torch.no_grad(), Rows() as rows:
        model.hidden(batch.tokens, lengths=batch.lengths)
    assert rows.seen == {int(batch.lengths.sum())}
