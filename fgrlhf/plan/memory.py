"""Memory of the parts of a model in bytes: activations, KV cache, adapters.

With c bytes per number, a batch of b rows of S tokens, and the letters of model.py:

    KV cache       2 c layers b S G K
    activations    b S (layers a + z) + tables        kept by autograd in one forward pass
      a = 2 (4 D + 2 c D + 4) + c (2 H K + 2 G K) + 4 H + 4 c F
          two norms (float32 input, normed, output); q and attention, k and v; log-sum-exp; four [F]
      z = 4 D + c D + 4 + 8                           the last norm, and the id of the token
    checkpointed   b S (layers c D + z)               only the inputs of the blocks

Rows that are padded by a token or two keep the output of attention twice, which is up to 5% more.
"""

from fgrlhf.model import LLaMAConfig


def activation_bytes(config: LLaMAConfig, batch: int, length: int, size: int,
                     checkpointing: bool = False) -> int:
    """Bytes that autograd keeps in one `LLaMA.hidden`. `size`: bytes per number, 2 or 4."""
    D = config.dim
    block = size * D if checkpointing else block_bytes(config, size)
    per_token = config.n_layers * block + 4 * D + size * D + 4 + 8
    return batch * length * per_token + 2 * 4 * length * config.head_dim // 2    # rotary tables


def block_bytes(config: LLaMAConfig, size: int) -> int:
    """Bytes that autograd keeps in the forward pass of one block, per token."""
    D, F, K = config.dim, config.ffn_dim, config.head_dim
    H, G = config.n_heads, config.n_kv_heads
    return (2 * (4 * D + 2 * size * D + 4) + size * (2 * H * K + 2 * G * K) + 4 * H + 4 * size * F)


def cache_bytes(config: LLaMAConfig, batch: int, slots: int, size: int) -> int:
    """Bytes of a KV cache with `slots` slots for each row of the batch."""
    return 2 * size * config.n_layers * batch * slots * config.n_kv_heads * config.head_dim


def adapter_count(config: LLaMAConfig, rank: int) -> int:
    """Counts the numbers in A and B of the seven projections of every block (lora.py)."""
    D, F, K = config.dim, config.ffn_dim, config.head_dim
    q_and_o, k_and_v = 2 * (D + config.n_heads * K), 2 * (D + config.n_kv_heads * K)
    return config.n_layers * rank * (q_and_o + k_and_v + 3 * (D + F))
