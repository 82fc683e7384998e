"""Random draws as functions of (seed, purpose, step).

No state of a random number generator is carried from step to step or saved. A resumed run therefore
draws what the run would have drawn without the stop, and so does any number of ranks.
"""

import hashlib
from functools import lru_cache

import torch


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """Returns a CPU generator that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def random_ids(lengths: list[int], vocab_size: int) -> list[list[int]]:
    """Draws ids in [3, vocab_size) for a text of each length, always the same.

    Benchmarks and checks work on such texts. The ids 0, 1 and 2 are control tokens there.
    """
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (n,), generator=draw).tolist() for n in lengths]


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """Returns range(count) in a random order, another one for each epoch."""
    return torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()


def batches(count: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """Cuts a `permutation` into batches of `size`; the last may be shorter."""
    order = permutation(count, seed, epoch)
    return [order[i:i + size] for i in range(0, count, size)]


def bucketed_batches(lengths: list[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Like `batches`, but sequences of similar length share a batch, so that little is padding.

    Windows of 16 batches of the permutation are sorted by length; the batches are then shuffled.
    """
    result = []
    for window in batches(len(lengths), 16 * size, seed, epoch):
        window.sort(key=lambda i: lengths[i])
        result += [window[i:i + size] for i in range(0, len(window), size)]
    order = torch.randperm(len(result), generator=generator(seed, "batches", epoch)).tolist()
    return [result[i] for i in order]


def rows_of_step(lengths: list[int], size: int, seed: int, step: int) -> list[int]:
    """Returns the batch of a step, from 1, in passes over all sequences (`bucketed_batches`)."""
    epoch, cursor = divmod(step - 1, -(-len(lengths) // size))
    return _batches_of_epoch(tuple(lengths), size, seed, epoch)[cursor]


@lru_cache(1)
def _batches_of_epoch(lengths: tuple[int, ...], size: int, seed: int,
                      epoch: int) -> list[list[int]]:
    """Keeps the batches of the last epoch, so that a step does not sort all sequences again."""
    return bucketed_batches(list(lengths), size, seed, epoch)
