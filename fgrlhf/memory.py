"""The bytes a model needs, before anybody tries: weights, optimizer, KV cache, activations.

    python -m fgrlhf.memory --preset 7B --batch 16 --length 492 --dtype bfloat16

With P parameters, c bytes a number, and the letters of `model`:

    weights         c P
    gradients       c P
    optimizer       2 c P                       Adam's two moments, in the weights' dtype
    KV cache        2 c layers B T G K
    activations     B T (layers a + b) + tables what autograd keeps of one forward pass
      a = 2 (4 D + 2 c D + 4) + c (2 D + 2 G K) + 4 H + 4 c F
          two norms: float32 input, normed, output; q and attention, k and v; log-sum-exp; four of F
      b = 4 D + c D + 4 + 8                     the last norm, the token itself
    checkpointed    B T (layers c D + a + b)    block inputs, and one block's `a` at a time

The activation counts are exact for this project's code with a flash attention (a test compares
them with what autograd saves). Logits are not counted: the losses in kernels/ make them a chunk at
a time. A policy in PPO needs all of it, its reference and reward model the weights alone.
"""

from dataclasses import dataclass

import torch

from fgrlhf.checkpoint import load_model
from fgrlhf.config import UserError, arg, parse, run
from fgrlhf.model import PRESETS, LLaMAConfig, parameter_count


@dataclass(frozen=True)
class Config:
    preset: str | None = arg(None, help="one of " + ", ".join(PRESETS))
    model: str | None = arg(None, help="or a checkpoint; its shapes are checked, no weight is read")
    batch: int = arg(1, help="sequences at a time")
    length: int = arg(2048, help="tokens of prompt and response")
    dtype: str = arg("bfloat16", choices=("float32", "bfloat16", "float16"), help="of the weights")


def activation_bytes(config: LLaMAConfig, batch: int, length: int, size: int,
                     checkpointing: bool = False) -> int:
    """Bytes autograd keeps of one `LLaMA.hidden`; `size` is that of one number, 2 or 4."""
    D, F, K = config.dim, config.ffn_dim, config.head_dim
    block = (2 * (4 * D + 2 * size * D + 4) + size * (2 * D + 2 * config.n_kv_heads * K)
             + 4 * config.n_heads + 4 * size * F)
    last = 4 * D + size * D + 4 + 8
    if checkpointing:
        a_token = config.n_layers * size * D + block + last
    else:
        a_token = config.n_layers * block + last
    return batch * length * a_token + 2 * 4 * length * K // 2           # and the rotary tables


def memory(config: LLaMAConfig, batch: int, length: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by what they are for."""
    size, parameters = dtype.itemsize, parameter_count(config)
    slots = config.n_layers * batch * length * config.n_kv_heads * config.head_dim
    return {
        "weights": size * parameters,
        "gradients": size * parameters,
        "optimizer": 2 * size * parameters,
        "KV cache": 2 * size * slots,
        "activations": activation_bytes(config, batch, length, size),
        "  checkpointed": activation_bytes(config, batch, length, size, checkpointing=True),
    }


def main(config: Config) -> None:
    if (config.preset is None) == (config.model is None) or config.preset not in (None, *PRESETS):
        raise UserError(f"expected --preset, one of {', '.join(PRESETS)}, or --model DIR; "
                        f"got --preset {config.preset} --model {config.model}")
    if config.batch < 1 or config.length < 1:
        raise UserError(f"expected --batch and --length of at least 1, got {config.batch} and "
                        f"{config.length}")
    sizes = PRESETS[config.preset] if config.preset else load_model(config.model, "meta").config
    table = memory(sizes, config.batch, config.length, getattr(torch, config.dtype))
    print(f"{config.preset or config.model}: {parameter_count(sizes):,} parameters, "
          f"{config.dtype}, batch {config.batch}, length {config.length}")
    for name, count in table.items():
        print(f"{name:14} {count:18,} bytes {count / 2**30:10.2f} GiB")


if __name__ == "__main__":
    run(lambda: main(parse(Config, prog="python -m fgrlhf.memory", description=__doc__)))
