"""Low-rank adapters over one frozen LLaMA (Hu et al. 2021, arXiv 2106.09685).

    y = x W^T + s (x A^T) B^T          W [out, in] frozen and shared, A [R, in], B [out, R], s = 2

Every projection of every block has its own A and B. Embedding, norms and output matrix belong to
the trunk. A starts at Normal(0, 1/sqrt(in)) and B at 0, so a new adapter changes no bit of the
result. `merge` returns the plain LLaMA with the weights W + s B A.

Policy, reference, reward model and critic share the tensors of one trunk. A 7B is therefore in
memory once, in the dtype of the run. Only adapters and heads have gradients, moments and master
weights. A folder of adapters names its trunk:

    adapters.pt      A and B of each projection, by their names in `named_parameters`
    adapters.json    {"base": folder of the trunk, "folder": that of the adapters, "rank": R,
                      "fingerprint": of the trunk}

When both folders were copied or moved together, "base" is found next to the adapters.
"""

import copy
import hashlib
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgrlhf.data.fields import UserError, show
from fgrlhf.data.files import read_object, write_atomic
from fgrlhf.engine.places import relocated
from fgrlhf.layouts.pickles import open_pickle
from fgrlhf.model import LLaMA

SCALE = 2.0                            # s = alpha / R in Hu et al., here with alpha = 2 R


class Adapted(nn.Module):
    """A linear map without bias: a shared weight W, and an A and B of its own."""

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
    """Returns a LLaMA with new adapters over the parameters of `trunk`, which are frozen.

    Raises UserError for a rank beyond the width of the model, which no adapter can use.
    """
    if rank > trunk.config.dim:
        raise UserError(f"--lora-rank {rank}: expected at most {trunk.config.dim}, the width of "
                        "the model")
    generator = torch.Generator().manual_seed(seed)
    model = _shell(trunk, trunk.requires_grad_(False).named_parameters())
    for block in model.layers:
        for part in (block.attention, block.feed_forward):
            for name, linear in list(part.named_children()):
                setattr(part, name, Adapted(linear.weight, rank, generator))
    return model


def _shell(trunk: LLaMA, parameters) -> LLaMA:
    """Returns a new LLaMA of the same sizes that holds the given parameters, not copies of them."""
    with torch.device("meta"):
        model = LLaMA(trunk.config)
    for name, parameter in parameters:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, parameter)
    model.activation_checkpointing = trunk.activation_checkpointing
    return model


def adapters(module: nn.Module) -> dict[str, Tensor]:
    """Returns every A and B in a module, by name. Without adapters the result is empty."""
    return {name: p for name, p in module.named_parameters() if ".lora_" in name}


def shared(module: nn.Module) -> dict[str, Tensor]:
    """Returns the shared trunk's parameters in a module, by name. Without adapters it is empty."""
    found = {}
    for path, part in module.named_modules():
        if isinstance(part, LLaMA) and adapters(part):
            dot = path + "." if path else ""
            found |= {dot + name: p for name, p in part.named_parameters() if ".lora_" not in name}
    return found


def clone(module: nn.Module) -> nn.Module:
    """Returns a deep copy that uses the same shared trunk, if there is one."""
    return copy.deepcopy(module, {id(p): p for p in shared(module).values()})


def train(module: nn.Module) -> nn.Module:
    """Lets every parameter be trained, except those of a shared trunk."""
    module.requires_grad_(True)
    for parameter in shared(module).values():
        parameter.requires_grad_(False)
    return module


@torch.no_grad()
def merge(model: LLaMA) -> LLaMA:
    """Returns the plain LLaMA with the weights W + s B A, which are summed in float32 or wider."""
    merged = {}
    for name, part in model.named_modules():
        if isinstance(part, Adapted):
            wide = torch.promote_types(part.weight.dtype, torch.float32)
            change = part.lora_b.to(wide) @ part.lora_a.to(wide)
            weight = (part.weight.to(wide) + SCALE * change).to(part.weight.dtype)
            merged[name + ".weight"] = nn.Parameter(weight)
    own = {n: p for n, p in model.named_parameters() if ".lora_" not in n}
    return _shell(model, (own | merged).items())


# ----- folders ------------------------------------------------------------------------------------

def is_folder(path: str | Path) -> bool:
    """Tells whether a folder holds adapters."""
    return (Path(path) / "adapters.json").is_file()


def fingerprint(model: LLaMA) -> str:
    """Returns a sha256 of the first row of each parameter of the trunk.

    The rows are converted to bfloat16, so the result is the same for every dtype of the run.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" not in name:
            row = parameter.detach().cpu() if parameter.dim() == 1 else parameter[0].detach().cpu()
            sha.update(f"{name} {tuple(parameter.shape)}\n".encode())
            sha.update(row.to(torch.bfloat16).view(torch.uint8).numpy())
    return sha.hexdigest()


def save(model: LLaMA, folder: Path, base: str) -> None:
    """Writes the adapters only, and last adapters.json. `base` is the folder of their trunk."""
    found = {name: p.detach().cpu() for name, p in adapters(model).items()}
    write_atomic(folder / "adapters.pt", lambda file: torch.save(found, file))
    rank = next(iter(found.values())).shape[0]
    about = {"base": base, "folder": str(folder.resolve()), "rank": rank,
             "fingerprint": fingerprint(model)}
    write_atomic(folder / "adapters.json", (json.dumps(about, indent=2) + "\n").encode())


def describe(folder: str | Path) -> dict:
    """Reads adapters.json: base, rank, fingerprint.

    Raises UserError when the file is damaged, and when the folder of the trunk does not exist.
    """
    path = Path(folder) / "adapters.json"
    about = read_object(path)
    for name, kind in (("base", str), ("rank", int), ("fingerprint", str)):
        if not isinstance(about.get(name), kind):
            raise UserError(f"{path}: {name}: expected {kind.__name__}, got "
                            f"{show(about.get(name))}: damaged; copy the folder again")
    base = relocated(about["base"], str(about.get("folder", folder)), folder)
    if not os.path.exists(base):
        raise UserError(f"{path}: base: expected the folder of the weights under these adapters, "
                        f"got {base if _is_readable(base) else show(base)}, which does not "
                        "exist; copy it there, or correct the path")
    return about | {"base": base}


def _is_readable(path: str) -> bool:
    return len(path) < 300 and path.isprintable()


def restore(model: LLaMA, folder: str | Path) -> LLaMA:
    """Copies a folder's adapters into `model`. Raises UserError if they belong to another trunk."""
    path, about = Path(folder) / "adapters.pt", describe(folder)
    own = adapters(model)
    if not any(p.is_meta for p in own.values()) and about["fingerprint"] != fingerprint(model):
        raise UserError(f"{folder}: expected the weights that these adapters were trained over in "
                        f"{about['base']}, got other weights; restore that folder")
    saved = open_pickle(path)
    shapes = lambda named: {name: getattr(x, "shape", None) for name, x in named.items()}
    if shapes(saved) != shapes(own):
        raise UserError(f"{path}: expected adapters of rank {about['rank']} for {about['base']}, "
                        "got other shapes; copy the folder again")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    return model
