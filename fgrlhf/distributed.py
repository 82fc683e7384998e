"""One run on many processes, by PyTorch's FSDP2: started by torchrun, each process is a rank.

    torchrun --nproc-per-node 4 train_ppo.py ...

Weights, gradients, moments and masters are shared out, 1/N a rank (`shard`); what is small is whole
on every rank: prompts, rollouts (ids and a few numbers a token), advantages, metrics. So every rank
runs the same script, line for line, and differs in three places: it samples and scores its share of
the rows (`span`, `mine`) with the model gathered for the while (`gathered`), and its share of each
minibatch goes through forward and backward (`shares`). Losses are sums over the share divided by
the token count of the whole minibatch, and gradients are added over ranks: the numbers of one
process, but for the order of additions. Random draws are functions of (seed, purpose, step), and a
rank skips the draws of the rows before its own.

For one process every function here is the identity, and no process group is made.

Adapted models (lora.py) are not sharded: the frozen trunk is small, and its adapters' gradients are
added up (`sum_gradients`), as are those of reward heads.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgrlhf import lora
from fgrlhf.model import LLaMA


def start(device: torch.device) -> torch.device:
    """Join the process group torchrun describes, if any; returns this rank's own device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    sys.excepthook = _say_who_stopped
    atexit.register(dist.destroy_process_group)
    return device


def _say_who_stopped(kind: type, error: BaseException, trace) -> None:
    """One line where another rank's end is the reason; a traceback for anything else."""
    if isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("Connection closed by peer", "gloo", "NCCL")):
        print(f"stopped: rank {rank()} lost the connection to another rank, which ended first; "
              "see its message, then continue with --resume", file=sys.stderr, flush=True)
        os._exit(1)                                     # the group cannot be left in good order
    sys.__excepthook__(kind, error, trace)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ----- models -------------------------------------------------------------------------------------

def shard(module: nn.Module) -> nn.Module:
    """Share out the parameters of every LLaMA in `module`, block by block (FSDP2)."""
    if size() == 1:
        return module
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    for model in [part for part in module.modules() if isinstance(part, LLaMA)]:
        if lora.adapters(model):
            continue
        mesh = init_device_mesh(model.head.device.type, (size(),))
        settings = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
        for block in model.layers:
            fully_shard(block, **settings)
        fully_shard(model, reshard_after_forward=False, **settings)     # `head` is used after it
        register_fsdp_forward_method(model, "hidden")
        for part in _sharded(model):
            part.set_gradient_divide_factor(1.0)                        # losses add, see above
            part.set_force_sum_reduction_for_comms(True)                # gloo has no other sum
    return module


def _sharded(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if hasattr(part, "set_reshard_after_forward")]


@contextlib.contextmanager
def gathered(*modules: nn.Module | None):
    """Inside, the modules hold whole weights, and a forward pass asks nothing of other ranks.

    For sampling, scoring and saving: ranks may run as many forward passes as they like.
    """
    parts = [part for module in modules if module is not None for part in _sharded(module)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(not isinstance(part, LLaMA), recurse=False)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor in the form of `other`: this rank's shard of it, where `other` is sharded."""
    if not is_sharded(other) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements,
                             src_data_rank=None)


# ----- rows ---------------------------------------------------------------------------------------

def span(count: int) -> tuple[int, int]:
    """This rank's rows start..stop of `count`, next to one another."""
    return count * rank() // size(), count * (rank() + 1) // size()


def mine(rows: list[int]) -> list[int]:
    """This rank's rows of a list: every N-th, so that lists sorted by length stay balanced."""
    return rows[rank()::size()]


def shares(rows: list[int], microbatch: int,
           group: Callable[[list[int], int], list]) -> Iterator[tuple[object, bool]]:
    """This rank's groups of a minibatch, each with whether it counts.

    A sharded forward pass needs every rank: one that has fewer groups than others gets the
    minibatch's first row again, to be divided by infinity. group(rows, microbatch) cuts rows into
    groups of at most `microbatch`, 0 meaning one group.
    """
    own = group(mine(rows), microbatch) if mine(rows) else []
    for number in range(largest(len(own))):
        if number < len(own):
            yield own[number], True
        else:
            yield group(rows[:1], 1)[0], False


def in_order(rows: list[int], microbatch: int) -> list[list[int]]:
    """Rows in groups of at most `microbatch`, 0: one group, in the order given."""
    step = microbatch or max(1, len(rows))
    return [rows[i:i + step] for i in range(0, len(rows), step)]


# ----- numbers ------------------------------------------------------------------------------------

def total(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, on every rank."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def totals(numbers: dict[str, float]) -> dict[str, float]:
    """Each number summed over ranks; every rank has the same names."""
    if size() == 1:
        return numbers
    device = "cpu" if dist.get_backend() == "gloo" else "cuda"
    summed = total(torch.tensor(list(numbers.values()), dtype=torch.float64, device=device))
    return dict(zip(numbers, summed.tolist()))


def largest(number: int) -> int:
    """The largest of every rank's number."""
    if size() == 1:
        return number
    tensor = torch.tensor(number, device="cpu" if dist.get_backend() == "gloo" else "cuda")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def sum_gradients(parameters: list[Tensor]) -> None:
    """Add up over ranks the gradients FSDP does not: those of parameters every rank holds whole."""
    for parameter in parameters:
        if parameter.grad is not None and not is_sharded(parameter):
            total(parameter.grad)


def clip_gradients(parameters: list[Tensor], clip_norm: float) -> float:
    """Clip the norm of all gradients together; returns it as it was."""
    if size() == 1:
        return float(nn.utils.clip_grad_norm_(parameters, clip_norm))
    kinds = [[p for p in parameters if p.grad is not None and is_sharded(p) == sharded]
             for sharded in (True, False)]
    norms = [whole(nn.utils.get_total_norm([p.grad for p in kind])) for kind in kinds if kind]
    norm = torch.stack([n.float() for n in norms]).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, clip_norm, norm)
    return float(norm)
