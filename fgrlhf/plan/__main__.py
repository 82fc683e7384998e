"""Plans the memory of a PPO run on each card: the bytes that stay, and the peak of each phase.

    python -m fgrlhf.plan --preset 7B --method fine-grained --card 141 --offload
    python -m fgrlhf.plan --preset 7B --lora-rank 8 --card 24

With P parameters, c bytes per number and N ranks (one card each):

    weights        c P / N for each of policy, reference, reward model (and critic)
    gradients      4 P / N        in float32
    moments        8 P / N        Adam's two, in float32
    master copy    4 P / N        only when the weights are in bfloat16
    KV cache, activations         see memory.py
    logits         of one chunk of tokens, with the gradients that the loss computes

With adapters every rank holds the trunk once and whole, and R (in + out) numbers per projection
replace P in the other rows. Sharded weights are gathered one block at a time in the update. For
sampling and scoring they are gathered whole, one model after the other. At the start every rank
reads whole models. Two things are not counted: the memory of the device's own libraries (1 GB and
more on a GPU; on a CPU in bfloat16 oneDNN keeps 256 KB per shape of a matmul), and fragmentation.
"""

from dataclasses import dataclass, replace

import torch

from fgrlhf.checkpoint import load_model
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import DTYPES, arg, parse, run
from fgrlhf.model import LLaMAConfig, parameter_count
from fgrlhf.plan import memory
from fgrlhf.presets import PRESETS
from fgrlhf.rollout import PREFILL
from kernels.linear_logp import TILE, TILE_ROWS
from kernels.three_matmuls import CACHED, most_tokens


@dataclass(frozen=True)
class Config:
    preset: str | None = arg(None, help="sizes of the models: one of " + ", ".join(PRESETS))
    model: str | None = arg(None, help="or a checkpoint; its shapes are checked, no weight is read")
    method: str = arg("fine-grained", choices=("fine-grained", "rlhf"), help="rlhf has a critic")
    batch: int = arg(16, least=1, help="sequences decoded at once, over all ranks "
                                       "(train_ppo.py --decode-batch times ranks)")
    microbatch: int = arg(1, least=1, help="sequences per forward pass on a rank")
    prompt: int = arg(192, least=1, help="tokens per prompt")
    response: int = arg(300, least=1, help="tokens per response")
    dtype: str = arg("bfloat16", choices=DTYPES, help="of weights and activations")
    lora_rank: int = arg(0, least=0, help="rank of the adapters; 0 trains all weights")
    world_size: int = arg(1, least=1, help="number of ranks, one card each")
    checkpoint_activations: bool = arg(True, help="keep one activation per block")
    offload: bool = arg(False, help="reference and reward model in host memory between uses")
    device: str = arg("cuda", choices=("cuda", "cpu"), help="chunks of logits are larger on cuda")
    card: float = arg(0.0, least=0, help="GB (10^9 bytes) of each card, to print a verdict")


def held(sizes: LLaMAConfig, config: Config) -> dict[str, int]:
    """Returns the bytes that stay during the whole run, on one rank, by what they hold."""
    c, N = getattr(torch, config.dtype).itemsize, config.world_size
    whole = parameter_count(sizes)
    own = memory.adapter_count(sizes, config.lora_rank) if config.lora_rank else -(-whole // N)
    critic = config.method == "rlhf"
    trained = own * (1 + critic)
    frozen = 0 if config.offload else c * own
    table = {"trunk, shared": c * whole} if config.lora_rank else {}
    table |= {"policy weights": c * own, "reference weights": frozen, "reward weights": frozen}
    table |= {"critic weights": c * own} if critic else {}
    return table | {"moments": 8 * trained, "master copy": 4 * trained if c < 4 else 0}


def chunk_bytes(sizes: LLaMAConfig, config: Config, tokens: int) -> int:
    """Returns the bytes of one chunk of logits in the loss, with those in float32 at a time."""
    dtype, V = getattr(torch, config.dtype), sizes.vocab_size
    most = most_tokens(V, dtype, config.device)
    rows = -(-tokens // -(-tokens // most))                             # chunks of similar size
    cached = rows * V if config.device != "cpu" else min(rows * V, CACHED)
    return rows * V * dtype.itemsize + (4 * cached if dtype.itemsize < 4 else 0)


def passing(sizes: LLaMAConfig, config: Config) -> dict[str, dict[str, int]]:
    """Returns the bytes that a phase allocates and frees again, on one rank, by phase and part."""
    c, V, D = getattr(torch, config.dtype).itemsize, sizes.vocab_size, sizes.dim
    N, S, b = config.world_size, config.prompt + config.response, config.microbatch
    P, lora = parameter_count(sizes), config.lora_rank > 0
    rows = -(-config.batch // N)
    sharded = N > 1 and not lora
    own = memory.adapter_count(sizes, config.lora_rank) if lora else -(-P // N)
    forward = lambda tokens: tokens * c * (3 * D + 3 * sizes.ffn_dim)   # h, two [D], three [F]
    away = config.offload and not lora
    tile = min(TILE_ROWS, b * config.response)
    tile *= min(V, TILE[config.device != "cpu"] // tile) * (c if c == 4 else c + 4)
    gradients = 4 * own * (2 if config.method == "rlhf" else 1)
    chunk = chunk_bytes(sizes, config, b * config.response)
    several = b * config.response > most_tokens(V, getattr(torch, config.dtype), config.device)
    head = 0 if lora else (c + 4 * (several and c < 4)) * V * D     # a sum of chunks is in float32
    again = b * S * memory.block_bytes(sizes, c) * config.checkpoint_activations
    ends = V * D * (1 if sizes.tie_embeddings else 2)                   # embedding and head
    return {
        "rollout": {
            "KV cache": memory.cache_bytes(sizes, rows, S, c), "gathered policy": c * P * sharded,
            "a decoding step": max(forward(min(rows, PREFILL) * config.prompt),
                                   rows * V * (20 if c == 4 else c + 20))},
        "scoring": {
            "gathered or fetched model": c * P * (sharded or away),
            "a forward pass": max(forward(b * S), c * b * S * 2 * D + tile)},
        "update": {
            "gradients": gradients,
            "gathered blocks": c * (ends + 2 * (P - ends) // sizes.n_layers) * sharded,
            "activations": memory.activation_bytes(sizes, b, S, c, config.checkpoint_activations),
            "logits chunk": chunk, "gradient of the head": head,
            "a block again, beyond these two": max(0, again - chunk - head)}}


def peaks(sizes: LLaMAConfig, config: Config) -> dict[str, int]:
    """Returns the largest number of bytes at any moment of each phase, on one rank."""
    resident = sum(held(sizes, config).values())
    models = 4 if config.method == "rlhf" else 3
    whole = getattr(torch, config.dtype).itemsize * parameter_count(sizes) * models
    loading = {"loading": whole} if config.world_size > 1 and not config.lora_rank else {}
    return loading | {phase: resident + sum(parts.values())
                      for phase, parts in passing(sizes, config).items()}


def remedies(config: Config) -> list[tuple[str, Config]]:
    """Lists flags that need less memory, the smallest change first, each with its Config."""
    tries = [{"checkpoint_activations": True}]
    if not config.lora_rank:
        if config.world_size == 1:
            tries.append({"checkpoint_activations": True, "offload": True})
        per_rank = config.batch // config.world_size
        tries += [{"world_size": n, "batch": per_rank * n, "offload": False}
                  for n in (2, 4, 8, 16) if n > config.world_size]
    tries += [{"lora_rank": 8, "offload": False}, {"lora_rank": 8, "batch": 1, "offload": False}]
    return [(_flags(changes), replace(config, **changes)) for changes in tries]


def _flags(changes: dict[str, bool | int]) -> str:
    """Writes changes of a Config as flags. False is the default, so its flag is left out."""
    return " ".join("--" + name.replace("_", "-") + ("" if value is True else f" {value}")
                    for name, value in changes.items() if value is not False)


def verdict(sizes: LLaMAConfig, config: Config) -> str:
    """Says whether the largest peak fits the card, and if not, the first flags that make it fit."""
    worst = max(peaks(sizes, config).values()) / 1e9
    if worst <= config.card:
        return f"fits {config.card:g} GB with {config.card - worst:.1f} GB to spare"
    for flags, other in remedies(config):
        if (least := max(peaks(sizes, other).values()) / 1e9) <= config.card:
            return (f"does not fit {config.card:g} GB: {worst - config.card:.1f} GB too much; it "
                    f"fits with {flags} ({least:.1f} GB)")
    return (f"does not fit {config.card:g} GB: {worst - config.card:.1f} GB too much, and no "
            "option of this command makes it fit")


def fitted(config: Config, context: int) -> Config:
    """Returns the Config, whose prompt and response together fit the context of the model.

    The defaults become half of a context that is too short for them. Raises UserError for other
    lengths that do not fit.
    """
    if config.prompt + config.response <= context:
        return config
    if (config.prompt, config.response) != (Config.prompt, Config.response):
        raise UserError(f"--prompt {config.prompt} --response {config.response}: expected at most "
                        f"{context} tokens together, the context of "
                        f"{config.preset or config.model}, got {config.prompt + config.response}; "
                        "lower one of them")
    print(f"--prompt {context // 2} --response {context // 2}, because the context of "
          f"{config.preset or config.model} is {context} tokens")
    return replace(config, prompt=context // 2, response=context // 2)


def main(config: Config) -> None:
    if (config.preset is None) == (config.model is None) or config.preset not in (None, *PRESETS):
        raise UserError(f"expected --preset, one of {', '.join(PRESETS)}, or --model DIR; "
                        f"got --preset {config.preset} --model {config.model}")
    if config.world_size > 1 and config.offload:
        raise UserError("--offload: expected --world-size 1, because sharded models are not moved")
    if config.lora_rank and config.offload:
        raise UserError("--offload: expected --lora-rank 0, because the trunk is shared")
    sizes = PRESETS[config.preset] if config.preset else load_model(config.model, "meta").config
    config = fitted(config, sizes.max_seq_len)
    line = lambda name, count: print(f"{name:35} {count:18,} {count / 1e9:9.2f} GB")
    print(f"{config.preset or config.model}: {parameter_count(sizes):,} parameters, "
          f"{config.dtype}, {config.method}; bytes on each of {config.world_size} card(s)")
    for name, count in held(sizes, config).items():
        line(name, count)
    for phase, parts in passing(sizes, config).items():
        for name, count in parts.items():
            if count:
                line(f"  {phase}: {name}", count)
    for phase, count in peaks(sizes, config).items():
        line(f"peak of {phase}", count)
    if config.card:
        print(verdict(sizes, config))


if __name__ == "__main__":
    run(lambda: main(parse(Config, __doc__)))
