"""Meta's layout, which is also the project's own: params.json and consolidated.NN.pth.

A model-parallel checkpoint has one file per rank. `wo` and `w2` are cut along their input, other
matrices along their output, the embedding along its width (LLaMA 1, 2) or its rows (LLaMA 3). Norms
are copied.

The project writes one file, and keys in params.json that Meta's files lack: "max_seq_len" and
"tie_embeddings" always, "head_dim" and "rope_scaling" where a model has them. Meta's own code reads
the folder of a model without the last two once the first two are removed. A key that changes
nothing (NO_EFFECT, or any key that is null, false or 0) is passed over; an unknown key may change
the model, and is refused. In Meta's own files the context is 2048, and

    use_scaled_rope    "llama3" of RopeScaling by "rope_scaling_factor", else by 8 for Llama 3.1 and
                       by 32 for the small models of Llama 3.2, and a context of 131072
    tied embeddings    Llama 3.2 stores the embedding a second time, as the output matrix
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fgrlhf.data.fields import check, show
from fgrlhf.layouts.pickles import open_pickle
from fgrlhf.layouts.stored import Stored, Weights, damaged, in_a_line, make_config, read_settings
from fgrlhf.model import MOST, LLaMAConfig, RopeScaling

ROW_PARALLEL = ("wo.weight", "w2.weight")
NO_EFFECT = ("max_batch_size", "model_parallel_size", "flash_attn", "dropout")  # on the weights


@dataclass(frozen=True)
class Params:
    """The fields of params.json."""

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int = -1                    # -1: as many as the embedding has rows
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int | None = None
    tie_embeddings: bool | None = None
    head_dim: int | None = None
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    rope_scaling: RopeScaling | None = None


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Returns F as Meta computes it: 2/3 of 4 D, times the multiplier, rounded up to a multiple."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def read(folder: Path) -> Weights:
    """Describes the sizes and tensors of a folder with params.json and consolidated.NN.pth."""
    place = folder / "params.json"
    values = read_settings(place)
    params = check(Params, values, str(place), also=(
        *NO_EFFECT, *(key for key, value in values.items() if not value)))
    for name, value, most in (
            ("dim", params.dim, MOST["dim"]), ("multiple_of", params.multiple_of, MOST["ffn_dim"]),
            ("ffn_dim_multiplier", params.ffn_dim_multiplier or 1, 2**10)):
        if not 0 < value <= most:
            raise damaged(place, f"{name}: expected a positive number of at most {most}, got "
                                 f"{show(value)}")
    shards = _open_shards(folder, (params.head_dim or 0) * params.n_heads or params.dim)
    tied, context = params.tie_embeddings, params.max_seq_len
    second = tied is None and params.use_scaled_rope and _stored_twice(shards)
    config = make_config(
        place, bool(tied or second), dim=params.dim, n_layers=params.n_layers,
        n_heads=params.n_heads,
        n_kv_heads=params.n_heads if params.n_kv_heads is None else params.n_kv_heads,
        vocab_size=_vocab_size(params, shards),
        ffn_dim=ffn_width(params.dim, params.multiple_of, params.ffn_dim_multiplier),
        norm_eps=params.norm_eps, rope_theta=params.rope_theta,
        max_seq_len=(131072 if params.use_scaled_rope else 2048) if context is None else context,
        head_width=params.head_dim, rope_scaling=_rope_scaling(params))
    names = {name: path for path, shard in shards.items() for name in shard
             if not name.endswith("rope.freqs")                 # a table, not a parameter
             and not (second and name == "output.weight")}
    for path, shard in shards.items():
        for name, elsewhere in names.items():
            if name not in shard:
                raise damaged(path, f"tensor {in_a_line(name)} is missing, but {elsewhere.name} "
                                    "has it")
    return config, {name: _merge(name, shards, params.dim) for name in names}


def _rope_scaling(params: Params) -> RopeScaling | None:
    """Returns the project's own "rope_scaling", or what Meta's keys say."""
    if params.rope_scaling is not None or not params.use_scaled_rope:
        return params.rope_scaling
    small = params.dim < 4096                               # 1B and 3B, which exist as 3.2 only
    factor = params.rope_scaling_factor
    return RopeScaling("llama3", (32.0 if small else 8.0) if factor is None else factor)


def _stored_twice(shards: Mapping[Path, Mapping[str, Tensor]]) -> bool:
    """Tells whether the output matrix equals the embedding. Reads both when their first rows do."""
    pairs = [(shard.get("tok_embeddings.weight"), shard.get("output.weight"))
             for shard in shards.values()]
    return all(a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype
               and torch.equal(a[:1], b[:1]) and torch.equal(a, b) for a, b in pairs)


def _open_shards(folder: Path, width: int) -> dict[Path, Mapping[str, Tensor]]:
    """Opens all shards in order. The first one's part of a matrix tells how many there must be.

    width: H K, the number of rows of the whole query matrix.
    """
    count = max(1, len(list(folder.glob("consolidated.*.pth"))))
    shards = {}
    for path in [folder / f"consolidated.{number:02d}.pth" for number in range(count)]:
        if not path.is_file():
            raise damaged(path, "this shard is missing")
        shards[path] = open_pickle(path)
    query = shards[folder / "consolidated.00.pth"].get("layers.0.attention.wq.weight")
    rows = query.shape[0] if query is not None and query.dim() == 2 else 0
    if rows and width % rows == 0 and width // rows > count:
        raise damaged(folder / f"consolidated.{count:02d}.pth", "this shard is missing, because "
                      f"consolidated.00.pth holds only 1/{width // rows} of each matrix")
    return shards


def _vocab_size(params: Params, shards: Mapping[Path, Mapping[str, Tensor]]) -> int:
    """Returns V. If params.json says -1 (LLaMA 1) or nothing (CodeLlama), the embedding tells V."""
    if params.vocab_size != -1:
        return params.vocab_size
    path, shard = next(iter(shards.items()))
    embedding = shard.get("tok_embeddings.weight")
    if embedding is None or embedding.dim() != 2:
        raise damaged(path, "tensor tok_embeddings.weight is missing or not a matrix")
    cut_by_rows = len(shards) > 1 and embedding.shape[1] == params.dim
    return embedding.shape[0] * (len(shards) if cut_by_rows else 1)


def _merge(name: str, shards: Mapping[Path, Mapping[str, Tensor]], dim: int) -> Stored:
    """Describes the parts of a tensor, one per shard, as one tensor."""
    file, first = next((path, shard[name]) for path, shard in shards.items())
    if len(shards) == 1 or first.dim() != 2:
        return Stored(file, name, tuple(first.shape), first.dtype,
                      lambda device: first.to(device, copy=True))
    along = int(name.endswith(ROW_PARALLEL)
                or name == "tok_embeddings.weight" and first.shape[1] != dim)
    parts = [shard[name] for shard in shards.values()]
    for path, part in zip(shards, parts):
        if part.shape != first.shape or part.dtype != first.dtype:
            raise damaged(path, f"tensor {in_a_line(name)}: expected {first.dtype} "
                                f"{tuple(first.shape)} as in {file.name}, got {part.dtype} "
                                f"{tuple(part.shape)}")
    shape = list(first.shape)
    shape[along] *= len(parts)
    return Stored(file, name, tuple(shape), first.dtype,
                  lambda device: torch.cat([part.to(device) for part in parts], dim=along))


def write_params(config: LLaMAConfig) -> dict:
    """Returns params.json. Meta derives F from two keys, whose values here give F back exactly."""
    params = {
        "dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads, "vocab_size": config.vocab_size,
        "multiple_of": config.ffn_dim, "norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "max_seq_len": config.max_seq_len, "tie_embeddings": config.tie_embeddings}
    if config.head_width is not None:
        params["head_dim"] = config.head_width
    if config.rope_scaling is not None:
        params["rope_scaling"] = asdict(config.rope_scaling)
    if (two_thirds := int(2 * (4 * config.dim) / 3)) > config.ffn_dim:
        params["ffn_dim_multiplier"] = (config.ffn_dim + 0.5) / two_thirds
    return params
