"""The bytes of a PPO run on one card, before anybody tries: what is held, and the peak per phase.

    python -m fgrlhf.plan --preset 7B --method fine-grained --card 141 --step-in-backward
    python -m fgrlhf.plan --preset 7B --lora-rank 8 --card 24

With P parameters, c bytes a number, N ranks, R the rank of adapters, and the letters of `model`:

    weights        c P / N for each of policy, reference, reward model (and critic)
    gradients      4 P / N        in float32; a step in backward: of the largest matrix alone
    moments        8 P / N        Adam's two, in float32
    master copy    4 P / N        where the weights are in bfloat16
    KV cache       2 c layers b S G K          b sequences decoded at once
    activations    b S (layers a + z) + tables what autograd keeps of one forward pass
      a = 2 (4 D + 2 c D + 4) + c (2 D + 2 G K) + 4 H + 4 c F
          two norms: float32 input, normed, output; q and attention, k and v; log-sum-exp; four of F
          (rows padded by a token or two keep attention's output twice: up to a twentieth more)
      z = 4 D + c D + 4 + 8                     the last norm, the token itself
    checkpointed   b S (layers c D + z)        block inputs; one block's `a` behind the loss
    logits         of one chunk, never of all tokens, with the gradients the loss makes on the spot

With adapters the trunk is held once, whole on every rank, and R (in + out) numbers a projection
take the place of P in the rest. Sharded weights are gathered a block at a time in the update, whole
for sampling and scoring, one model after another; every rank reads whole models at the start. What
the device's own libraries hold (1 GB and more on a GPU; on a CPU in bfloat16 oneDNN keeps 256 KB a
shape of a matmul) is not counted, nor is fragmentation.
"""

from dataclasses import dataclass, replace

import torch

from fgrlhf.checkpoint import load_model
from fgrlhf.config import UserError, arg, parse, run
from fgrlhf.model import DTYPES, PRESETS, LLaMAConfig, parameter_count
from fgrlhf.rollout import PREFILL
from kernels.linear_logp import TILE, TILE_ROWS
from kernels.three_matmuls import CHUNK, LOGITS


@dataclass(frozen=True)
class Config:
    preset: str | None = arg(None, help="one of " + ", ".join(PRESETS))
    model: str | None = arg(None, help="or a checkpoint; its shapes are checked, no weight is read")
    method: str = arg("fine-grained", choices=("fine-grained", "rlhf"), help="rlhf has a critic")
    batch: int = arg(16, least=1, help="sequences decoded at once, over all ranks "
                                       "(train_ppo.py --decode-batch)")
    microbatch: int = arg(1, least=1, help="sequences a forward pass on a rank")
    prompt: int = arg(192, least=1, help="tokens of a prompt")
    response: int = arg(300, least=1, help="tokens of a response")
    dtype: str = arg("bfloat16", choices=DTYPES, help="of weights and activations")
    lora_rank: int = arg(0, least=0, help="rank of adapters; 0 trains all weights")
    world_size: int = arg(1, least=1, help="ranks, one card each")
    checkpoint_activations: bool = arg(True, help="keep one activation a block")
    step_in_backward: bool = arg(False, help="hold no gradients")
    offload: bool = arg(False, help="reference and reward model in host memory between uses")
    device: str = arg("cuda", choices=("cuda", "cpu"), help="chunks of logits are larger on cuda")
    card: float = arg(0.0, least=0, help="GB (10^9 bytes) of the card; say what makes it fit")


def activation_bytes(config: LLaMAConfig, batch: int, length: int, size: int,
                     checkpointing: bool = False) -> int:
    """Bytes autograd keeps of one `LLaMA.hidden`; `size` is that of one number, 2 or 4."""
    D = config.dim
    block = size * D if checkpointing else block_bytes(config, size)
    a_token = config.n_layers * block + 4 * D + size * D + 4 + 8
    return batch * length * a_token + 2 * 4 * length * config.head_dim // 2     # and rotary tables


def block_bytes(config: LLaMAConfig, size: int) -> int:
    """Bytes autograd keeps of one block's forward pass, a token."""
    D, F, K = config.dim, config.ffn_dim, config.head_dim
    return (2 * (4 * D + 2 * size * D + 4) + size * (2 * D + 2 * config.n_kv_heads * K)
            + 4 * config.n_heads + 4 * size * F)


def cache_bytes(config: LLaMAConfig, batch: int, slots: int, size: int) -> int:
    """Bytes of the KV cache."""
    return 2 * size * config.n_layers * batch * slots * config.n_kv_heads * config.head_dim


def adapter_count(config: LLaMAConfig, rank: int) -> int:
    """Numbers in the A and B of the seven projections of every block."""
    D, F, width = config.dim, config.ffn_dim, config.n_kv_heads * config.head_dim
    return config.n_layers * rank * (2 * (D + D) + 2 * (D + width) + 3 * (D + F))


def held(sizes: LLaMAConfig, config: Config) -> dict[str, int]:
    """Bytes that stay, on one rank."""
    c, N = getattr(torch, config.dtype).itemsize, config.world_size
    whole = parameter_count(sizes)
    own = adapter_count(sizes, config.lora_rank) if config.lora_rank else -(-whole // N)
    critic = config.method == "rlhf"
    trained = own * (1 + critic)
    frozen = 0 if config.offload else c * own
    table = {"trunk, shared": c * whole} if config.lora_rank else {}
    table |= {"policy weights": c * own, "reference weights": frozen, "reward weights": frozen}
    table |= {"critic weights": c * own} if critic else {}
    return table | {"moments": 8 * trained, "master copy": 4 * trained if c < 4 else 0}


def chunk_bytes(sizes: LLaMAConfig, config: Config, tokens: int) -> int:
    """One chunk of logits in the loss, with the float32 copy a half needs."""
    c, V = getattr(torch, config.dtype).itemsize, sizes.vocab_size
    most = max(CHUNK, LOGITS[config.device != "cpu"] // V)
    rows = -(-tokens // -(-tokens // most))                             # chunks of about equal size
    return rows * V * (c if c == 4 else c + 4 + c)


def passing(sizes: LLaMAConfig, config: Config) -> dict[str, dict[str, int]]:
    """Bytes that come and go on one rank, by phase."""
    c, V, D = getattr(torch, config.dtype).itemsize, sizes.vocab_size, sizes.dim
    N, S, b = config.world_size, config.prompt + config.response, config.microbatch
    P, lora = parameter_count(sizes), config.lora_rank > 0
    rows = -(-config.batch // N)
    sharded = N > 1 and not lora
    own = adapter_count(sizes, config.lora_rank) if lora else -(-P // N)
    forward = lambda tokens: tokens * c * (3 * D + 3 * sizes.ffn_dim)    # h, two of D, three of F
    away = config.offload and not lora
    tile = min(TILE_ROWS, b * config.response)
    tile *= min(V, TILE[config.device != "cpu"] // tile) * (c if c == 4 else c + 4)
    largest = 0 if lora else V * D
    one_at_a_time = (c + 4) * largest
    gradients = 4 * own * (2 if config.method == "rlhf" else 1)
    chunk = chunk_bytes(sizes, config, b * config.response)
    head = 0 if lora else (4 + (c < 4) * c) * V * D
    again = b * S * block_bytes(sizes, c) * config.checkpoint_activations
    return {
        "rollout": {
            "KV cache": cache_bytes(sizes, rows, S, c), "gathered policy": c * P * sharded,
            "a decoding step": max(forward(min(rows, PREFILL) * config.prompt),
                                   rows * V * (20 if c == 4 else c + 20))},
        "scoring": {
            "gathered or fetched model": c * P * (sharded or away),
            "a forward pass": max(forward(b * S), c * b * S * 2 * D + tile)},
        "update": {
            "gradients": one_at_a_time if config.step_in_backward else gradients,
            "gathered blocks": c * (2 * V * D + 2 * (P - 2 * V * D) // sizes.n_layers) * sharded,
            "activations": activation_bytes(sizes, b, S, c, config.checkpoint_activations),
            "logits chunk": chunk, "gradient of the head": head,
            "a block again, beyond these two": max(0, again - chunk - head)}}


def peaks(sizes: LLaMAConfig, config: Config) -> dict[str, int]:
    """The largest sum of bytes at any moment of each phase."""
    resident = sum(held(sizes, config).values())
    models = 4 if config.method == "rlhf" else 3
    whole = getattr(torch, config.dtype).itemsize * parameter_count(sizes) * models
    loading = {"loading": whole} if config.world_size > 1 and not config.lora_rank else {}
    return loading | {phase: resident + sum(parts.values())
            for phase, parts in passing(sizes, config).items()}


def remedies(config: Config) -> list[tuple[str, Config]]:
    """Flags to try, gentlest first, each with what comes of it."""
    tries = []
    alone = config.world_size == 1 and not config.lora_rank
    for flags in ((), ("offload",), ("step_in_backward",), ("offload", "step_in_backward")):
        if alone or not flags:
            flags = ("checkpoint_activations", *flags)
            tries.append((" ".join("--" + f.replace("_", "-") for f in flags),
                          replace(config, **dict.fromkeys(flags, True))))
    for ranks in (2, 4, 8, 16):
        if ranks > config.world_size and not config.lora_rank:
            tries.append((f"--world-size {ranks}", replace(
                config, world_size=ranks, batch=config.batch * ranks // config.world_size,
                step_in_backward=False, offload=False)))
    tries.append(("--lora-rank 8", replace(config, lora_rank=8, offload=False)))
    tries.append(("--lora-rank 8 --batch 1", replace(config, lora_rank=8, offload=False, batch=1)))
    return tries


def verdict(sizes: LLaMAConfig, config: Config) -> str:
    """Whether the largest peak fits the card, and if not the first flags that make it."""
    worst = max(peaks(sizes, config).values()) / 1e9
    if worst <= config.card:
        return f"fits {config.card:g} GB with {config.card - worst:.1f} GB to spare"
    for flags, other in remedies(config):
        if (least := max(peaks(sizes, other).values()) / 1e9) <= config.card:
            return (f"does not fit {config.card:g} GB: {worst - config.card:.1f} GB too much; "
                    f"{flags} makes it {least:.1f} GB")
    return (f"does not fit {config.card:g} GB: {worst - config.card:.1f} GB too much, and "
            "no option here makes it fit")


def main(config: Config) -> None:
    if (config.preset is None) == (config.model is None) or config.preset not in (None, *PRESETS):
        raise UserError(f"expected --preset, one of {', '.join(PRESETS)}, or --model DIR; "
                        f"got --preset {config.preset} --model {config.model}")
    if config.world_size > 1 and (config.step_in_backward or config.offload):
        raise UserError("--step-in-backward and --offload: expected --world-size 1; sharded models "
                        "have neither")
    if config.lora_rank and config.offload:
        raise UserError("--offload: expected --lora-rank 0; the trunk is shared")
    sizes = PRESETS[config.preset] if config.preset else load_model(config.model, "meta").config
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
        line(f"peak of the {phase}", count)
    if config.card:
        print(verdict(sizes, config))


if __name__ == "__main__":
    run(lambda: main(parse(Config, prog="python -m fgrlhf.plan", description=__doc__)))
