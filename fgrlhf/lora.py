"""Low-rank adapters over one frozen LLaMA (Hu et al. 2021, arXiv 2106.09685).

    y = x W^T + s (x A^T) B^T          W [out, in] frozen and shared, A [R, in], B [out, R], s = 2

Every projection of every block has its own A and B; embedding, norms and output matrix are the
trunk's. A starts at Normal(0, 1/sqrt(in)), B at 0: a fresh adapter changes no bit. `merge` gives
the plain LLaMA with W + s B A.

Policy, reference, reward model and critic are LLaMAs whose `weight`s are the very same tensors, so
a 7B is held once, in the dtype of the run, and only adapters and heads have gradients, moments and
masters. A folder of adapters names its base and a fingerprint of it:

    adapters.pt      the A and B of each projection, by the names of `named_parameters`
    adapters.json    {"base": folder of the trunk, "rank": R, "fingerprint": ...}, written last
"""

import copy
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgrlhf.config import UserError
from fgrlhf.files import read_bytes, write_atomic
from fgrlhf.model import LLaMA

SCALE = 2.0                            # s: alpha / R of the paper with alpha = 2 R


class Adapted(nn.Module):
    """A linear map without bias over a shared weight, with its own A and B."""

    def __init__(self, weight: nn.Parameter, rank: int, generator: torch.Generator):
        super().__init__()
        out, width = weight.shape
        like = {"device": weight.device, "dtype": weight.dtype}
        a = torch.randn(rank, width, generator=generator) * width ** -0.5
        self.weight, self.lora_a = weight, nn.Parameter(a.to(**like))
        self.lora_b = nn.Parameter(torch.zeros(out, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)


def adapt(trunk: LLaMA, rank: int, seed: int = 0) -> LLaMA:
    """A LLaMA over the parameters of `trunk`, frozen from now on, with fresh adapters."""
    generator = torch.Generator().manual_seed(seed)
    model = _shell(trunk, trunk.requires_grad_(False).named_parameters())
    for block in model.layers:
        for part in (block.attention, block.feed_forward):
            for name, linear in list(part.named_children()):
                setattr(part, name, Adapted(linear.weight, rank, generator))
    return model


def _shell(trunk: LLaMA, parameters) -> LLaMA:
    """A new LLaMA of the trunk's sizes that holds the given parameters themselves."""
    with torch.device("meta"):
        model = LLaMA(trunk.config)
    for name, parameter in parameters:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, parameter)
    model.activation_checkpointing = trunk.activation_checkpointing
    return model


def adapters(module: nn.Module) -> dict[str, Tensor]:
    """The A and B inside a module, by name; empty where nothing is adapted."""
    return {name: p for name, p in module.named_parameters() if ".lora_" in name}


def shared(module: nn.Module) -> dict[str, Tensor]:
    """The trunk's parameters inside an adapted module, by name; empty where nothing is adapted."""
    found = {}
    for path, part in module.named_modules():
        if isinstance(part, LLaMA) and adapters(part):
            dot = path + "." if path else ""
            found |= {dot + name: p for name, p in part.named_parameters() if ".lora_" not in name}
    return found


def clone(module: nn.Module) -> nn.Module:
    """A deep copy, but for a shared trunk: that stays the one."""
    return copy.deepcopy(module, {id(p): p for p in shared(module).values()})


def train(module: nn.Module) -> nn.Module:
    """Give every parameter a gradient, but those of a shared trunk."""
    module.requires_grad_(True)
    for parameter in shared(module).values():
        parameter.requires_grad_(False)
    return module


@torch.no_grad()
def merge(model: LLaMA) -> LLaMA:
    """The plain LLaMA of an adapted one: W + s B A, summed in float32 at least."""
    merged = {}
    for name, part in model.named_modules():
        if isinstance(part, Adapted):
            wide = torch.promote_types(part.weight.dtype, torch.float32)
            change = part.lora_b.to(wide) @ part.lora_a.to(wide)
            weight = (part.weight.to(wide) + SCALE * change).to(part.weight.dtype)
            merged[name + ".weight"] = nn.Parameter(weight)
    own = {n: p for n, p in model.named_parameters() if ".lora_" not in n}
    return _shell(model, (own | merged).items())


class Own:
    """What a training state holds of a module: all of it but a shared trunk."""

    def __init__(self, module: nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        elsewhere = shared(self.module)
        return {n: x for n, x in self.module.state_dict().items() if n not in elsewhere}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        whole = self.module.state_dict()
        if state.keys() != self.state_dict().keys():
            raise UserError("training state: it is of a model with other parameters "
                            "(--lora-rank?); start anew in another --out")
        self.module.load_state_dict(whole | state)


# ----- folders ------------------------------------------------------------------------------------

def is_folder(path: str | Path) -> bool:
    return (Path(path) / "adapters.json").is_file()


def fingerprint(model: LLaMA) -> str:
    """sha256 over the first row of each parameter as bfloat16: the same in every dtype loaded."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" not in name:
            row = parameter.detach().cpu() if parameter.dim() == 1 else parameter[0].detach().cpu()
            sha.update(f"{name} {tuple(parameter.shape)}\n".encode())
            sha.update(row.to(torch.bfloat16).view(torch.uint8).numpy())
    return sha.hexdigest()


def save(model: LLaMA, folder: Path, base: str) -> None:
    """Write the adapters alone; `base` is the folder of their trunk."""
    found = {name: p.detach().cpu() for name, p in adapters(model).items()}
    write_atomic(folder / "adapters.pt", lambda file: torch.save(found, file))
    rank = next(iter(found.values())).shape[0]
    about = {"base": base, "rank": rank, "fingerprint": fingerprint(model)}
    write_atomic(folder / "adapters.json", (json.dumps(about, indent=2) + "\n").encode())


def describe(folder: str | Path) -> dict:
    """adapters.json: base, rank, fingerprint. Raises UserError when it is damaged."""
    path = Path(folder) / "adapters.json"
    try:
        about = json.loads(read_bytes(path))
        return {"base": str(about["base"]), "rank": int(about["rank"]),
                "fingerprint": str(about["fingerprint"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}); "
                        "copy the folder again") from None


def restore(model: LLaMA, folder: str | Path) -> LLaMA:
    """Put a folder's adapters into `model`. Raises UserError when they are of another trunk."""
    path, about = Path(folder) / "adapters.pt", describe(folder)
    own = adapters(model)
    if not any(p.is_meta for p in own.values()) and about["fingerprint"] != fingerprint(model):
        raise UserError(f"{folder}: these adapters belong to other weights than {about['base']} "
                        "holds now; give them back their base")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(x.shape) for name, x in saved.items()}
    except Exception as error:                      # a flipped bit in a pickle can raise anything
        raise UserError(f"{path}: damaged ({type(error).__name__}); "
                        "copy the folder again") from None
    if shapes != {name: tuple(p.shape) for name, p in own.items()}:
        raise UserError(f"{path}: does not fit {about['base']}; copy the folder again")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    return model
