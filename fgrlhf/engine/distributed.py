"""One run on one process or on many, by PyTorch's FSDP2. Under torchrun each process is a rank.

    torchrun --nproc-per-node 4 train_ppo.py ...

Large things are shared out, 1/N per rank: weights, gradients, moments, master weights (`shard`).
Small things are whole on every rank: prompts, rollouts, advantages, metrics. Every rank therefore
runs the same script, line for line. Three things differ between ranks:

    sampling, scoring    each rank does its own rows (`rank_range`, `rank_rows`), with whole weights
                         inside `gathered`
    updates              each rank does its own microbatches of every minibatch (`microbatches`)
    numbers              are added up over ranks (`Sums`, `total`)

A loss is a sum over a microbatch divided by the token count of the whole minibatch, and gradients
are added over ranks. The numbers are those of one process except for the order of additions. With
one process every function here returns its argument, and no process group exists.

Adapted models (lora.py) are not sharded. The frozen trunk is whole on every rank, and the gradients
of adapters and of reward heads are added up by `clip_gradients`.
"""

import atexit
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgrlhf.data.fields import UserError
from fgrlhf.engine import lora
from fgrlhf.model import LLaMA
from kernels.memory import keep_freed


def pick_device(name: str) -> torch.device:
    """Returns the device of that name. "auto" is CUDA if there is one, otherwise the CPU.

    On a CPU, freed memory stays with the process (kernels/memory.py). A GPU becomes the current
    one, on whose streams graphs are captured (graph.py). Raises UserError for a device that cannot
    be used here.
    """
    if name.startswith("mps"):
        raise UserError("--device mps: not supported, it has no float64; use cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        number = torch.zeros(1, device=name)
        device, _ = number.device, number.item()                # "meta" holds no numbers
    except Exception as error:                                  # each backend raises its own kind
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {name}: not usable here ({reason}); give auto, cpu or "
                        "cuda") from None
    if device.type == "cpu":
        keep_freed()
    elif device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def start(device: torch.device) -> torch.device:
    """Joins the process group that torchrun describes, if any. Returns the device of this rank."""
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
    """Prints one line when another rank's end is the reason, and a traceback for anything else."""
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
    """Shares out the parameters of every LLaMA in `module`, block by block (FSDP2)."""
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
def gathered(*modules: nn.Module, device: torch.device | None = None):
    """A block in which the modules hold whole weights, for sampling, scoring and saving.

    A forward pass inside the block needs no other rank, so ranks may run different numbers of them.
    With `device`, modules that are elsewhere (--offload) are there for the block.
    """
    parts = [part for module in modules for part in _sharded(module)]
    away = [(module, p.device) for module in modules for p in [*module.parameters()][:1]
            if device is not None and p.device != device]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    for module, _ in away:
        module.to(device)
    try:
        yield
    finally:
        for module, home in away:
            module.to(home)
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(not isinstance(part, LLaMA), recurse=False)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a sharded tensor, on every rank; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns a whole tensor in the form of `other`: this rank's shard if `other` is sharded."""
    if not is_sharded(other) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements,
                             src_data_rank=None)


# ----- rows ---------------------------------------------------------------------------------------

def rank_range(count: int) -> tuple[int, int]:
    """Returns (start, stop): this rank's rows of `count`, next to one another."""
    return count * rank() // size(), count * (rank() + 1) // size()


def rank_rows(rows: Sequence[int]) -> Sequence[int]:
    """Returns this rank's rows: every N-th, so that a list sorted by length stays balanced."""
    return rows[rank()::size()]


def in_order(rows: Sequence[int], most: int) -> list[Tensor]:
    """Cuts rows into groups of at most `most` (0: one group), in the given order."""
    step = most or max(1, len(rows))
    return [torch.tensor(rows[i:i + step]) for i in range(0, len(rows), step)]


def microbatches(rows: Sequence[int], most: int,
                 group: Callable[..., list[Tensor]] = in_order) -> Iterator[tuple[Tensor, float]]:
    """Yields this rank's microbatches of a minibatch, each with the weight of its loss.

    `group(rows, most)` cuts rows into groups of at most `most` (0: one group). A forward pass of
    sharded weights needs every rank. A rank that has fewer groups than another repeats the first
    row of the minibatch, with weight 0; every other weight is 1.
    """
    own = group(rank_rows(rows), most)
    for number in range(largest(len(own))):
        if number < len(own):
            yield own[number], 1.0
        else:
            yield group(rows[:1], 1)[0], 0.0


# ----- numbers ------------------------------------------------------------------------------------

def total(tensor: Tensor) -> Tensor:
    """Returns the sum of every rank's tensor, on every rank."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


class Sums:
    """Named numbers, added up over the microbatches of a minibatch and then over ranks."""

    def __init__(self):
        self.values: dict[str, float] = {}

    def add(self, weight: float, terms: dict[str, Tensor]) -> None:
        """Adds weight * term to the sum of each name. Raises FloatingPointError if not finite."""
        for name, term in terms.items():
            value = weight * term.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")
            self.values[name] = self.values.get(name, 0.0) + value

    def over_ranks(self) -> dict[str, float]:
        """Returns each sum over all ranks. Every rank has the same names."""
        if size() == 1:
            return self.values
        device = "cpu" if dist.get_backend() == "gloo" else "cuda"
        summed = total(torch.tensor(list(self.values.values()), dtype=torch.float64, device=device))
        return dict(zip(self.values, summed.tolist()))


def largest(number: int) -> int:
    """Returns the largest of every rank's number."""
    if size() == 1:
        return number
    tensor = torch.tensor(number, device="cpu" if dist.get_backend() == "gloo" else "cuda")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def from_all_ranks(parts: list) -> list:
    """Returns the lists of all ranks, one behind the other. The items' tensors are on the CPU."""
    if size() == 1:
        return parts
    lists = [None] * size()
    dist.all_gather_object(lists, parts)
    return sum(lists, [])


def clip_gradients(parameters: list[Tensor], whole_on_ranks: list[Tensor],
                   clip_norm: float) -> float:
    """Clips the norm of all gradients together. Returns the norm before clipping.

    The gradients of `whole_on_ranks`, parameters that every rank holds whole, are first added up
    over ranks; FSDP has done so for the others.
    """
    if size() == 1:
        return float(nn.utils.clip_grad_norm_(parameters, clip_norm))
    for parameter in whole_on_ranks:
        if parameter.grad is not None and not is_sharded(parameter):
            total(parameter.grad)
    kinds = [[p for p in parameters if p.grad is not None and is_sharded(p) == sharded]
             for sharded in (True, False)]
    norms = [whole(nn.utils.get_total_norm([p.grad for p in kind])) for kind in kinds if kind]
    norm = torch.stack([n.float() for n in norms]).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, clip_norm, norm)
    return float(norm)
