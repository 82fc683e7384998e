"""LLaMA by its definition: one unpadded sequence, one head and one query position at a time.

    h_0     = E[tokens]
    h'_l    = h_l  + Wo attention(RMSNorm(h_l))
    h_{l+1} = h'_l + W2 (silu(W1 u) * W3 u)                  u = RMSNorm(h'_l)
    logits  = RMSNorm(h_L) head^T

A padded batch is a loop over its rows without their padding, so padding cannot change a result.
The batches of the cases hold random ids in the padding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fgrlhf.golden.case import GARBAGE, Case, Draw, mask_of, number

# K = 6. With K = 4, sqrt(K) and K / 2 are equal, and an error could hide.
CONFIG = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 20, "ffn_dim": 14,
          "norm_eps": 1e-5, "rope_theta": 10000.0}
PROMPTS, RESPONSES, WIDTH = (3, 1, 5), (5, 6, 2), 9          # lengths in tokens; S, padded


class Batch(NamedTuple):
    """Prompts with their responses, right-padded."""

    tokens: Tensor                      # [B, S] int64: prompt, response, then random ids
    prompt_lengths: Tensor              # [B]
    response_lengths: Tensor            # [B]

    def row(self, b: int) -> tuple[list[int], int]:
        """Returns (the ids without padding, the length of the prompt)."""
        start = int(self.prompt_lengths[b])
        return self.tokens[b, :start + int(self.response_lengths[b])].tolist(), start


def weights() -> dict[str, Tensor]:
    """The weights of the tiny model, under the names of Meta's checkpoints."""
    D, F, V = CONFIG["dim"], CONFIG["ffn_dim"], CONFIG["vocab_size"]
    kv = CONFIG["n_kv_heads"] * D // CONFIG["n_heads"]
    draw = Draw("model")
    made = {"tok_embeddings.weight": draw.numbers(V, D)}
    for layer in range(CONFIG["n_layers"]):
        shapes = {"attention.wq": (D, D), "attention.wk": (kv, D), "attention.wv": (kv, D),
                  "attention.wo": (D, D), "feed_forward.w1": (F, D), "feed_forward.w2": (D, F),
                  "feed_forward.w3": (F, D)}
        for name, shape in shapes.items():
            made[f"layers.{layer}.{name}.weight"] = draw.numbers(*shape, scale=0.5)
        for name in ("attention_norm", "ffn_norm"):
            made[f"layers.{layer}.{name}.weight"] = 1 + draw.numbers(D, scale=0.5)
    return made | {"norm.weight": 1 + draw.numbers(D, scale=0.5),
                   "output.weight": draw.numbers(V, D, scale=0.5)}


def batch(name: str) -> Batch:
    """Three rows of different lengths."""
    draw = Draw(name + " tokens")
    tokens = torch.tensor([draw.ids(WIDTH, 3, CONFIG["vocab_size"]) for _ in PROMPTS])
    return Batch(tokens, torch.tensor(PROMPTS), torch.tensor(RESPONSES))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of one vector [D]."""
    return weight * x / torch.sqrt((x * x).sum() / len(x) + eps)


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Turns each pair (x_2i, x_2i+1) of one head's vector [K] by position theta^(-2i/K) radians."""
    turned = []
    for i in range(0, len(x), 2):
        angle = position * theta ** (-i / len(x))
        turned.append(x[i] * math.cos(angle) - x[i + 1] * math.sin(angle))
        turned.append(x[i] * math.sin(angle) + x[i + 1] * math.cos(angle))
    return torch.stack(turned)


def attention(x: Tensor, matrices: dict[str, Tensor], n_heads: int, n_kv_heads: int,
              theta: float) -> Tensor:
    """x [T, D] -> [T, D], at positions 0..T-1. A query sees its own position and those before."""
    K, result = len(matrices["wq"]) // n_heads, []
    part = lambda y, head: y[head * K:(head + 1) * K]
    q, k, v = (x @ matrices[name].T for name in ("wq", "wk", "wv"))
    for t in range(len(x)):
        heads = []
        for head in range(n_heads):
            key_head = head // (n_heads // n_kv_heads)
            query = rotate(part(q[t], head), t, theta)
            scores = torch.stack([query @ rotate(part(k[s], key_head), s, theta)
                                  for s in range(t + 1)]) / math.sqrt(K)
            p = torch.exp(scores - scores.max())
            p = p / p.sum()
            heads.append(sum(p[s] * part(v[s], key_head) for s in range(t + 1)))
        result.append(torch.cat(heads) @ matrices["wo"].T)
    return torch.stack(result)


def hidden(ids: list[int], w: dict[str, Tensor]) -> Tensor:
    """[T, D]: the hidden states after the last norm."""
    def normed(h, name):
        return torch.stack([rms_norm(x, w[name + ".weight"], CONFIG["norm_eps"]) for x in h])

    h = torch.stack([w["tok_embeddings.weight"][id] for id in ids])
    for layer in range(CONFIG["n_layers"]):
        at = f"layers.{layer}."
        matrices = {n: w[f"{at}attention.{n}.weight"] for n in ("wq", "wk", "wv", "wo")}
        h = h + attention(normed(h, at + "attention_norm"), matrices, CONFIG["n_heads"],
                          CONFIG["n_kv_heads"], CONFIG["rope_theta"])
        u = normed(h, at + "ffn_norm")
        gate, up = (u @ w[f"{at}feed_forward.{n}.weight"].T for n in ("w1", "w3"))
        h = h + (gate / (1 + torch.exp(-gate)) * up) @ w[f"{at}feed_forward.w2.weight"].T
    return normed(h, "norm")


def log_softmax(logits: Tensor) -> Tensor:
    """log softmax of one vector [V]."""
    return logits - logits.max() - torch.log(torch.exp(logits - logits.max()).sum())


def response_logp(given: Batch, w: dict[str, Tensor], temperature: float) -> list[list[Tensor]]:
    """log pi of each response token, from the position before it: one list per row."""
    rows = []
    for b in range(len(given.tokens)):
        ids, start = given.row(b)
        h = hidden(ids, w)
        rows.append([log_softmax(h[at - 1] @ w["output.weight"].T / temperature)[ids[at]]
                     for at in range(start, len(ids))])
    return rows


def padded(rows: list, width: int) -> Tensor:
    """Rows of different lengths -> [B, width, ...], 0 in the padding."""
    result = torch.zeros(len(rows), width, *torch.as_tensor(rows[0][0]).shape, dtype=torch.float64)
    for b, row in enumerate(rows):
        for t, value in enumerate(row):
            result[b, t] = value
    return result


def part_cases() -> list[Case]:
    """RoPE, RMSNorm and attention, each separately."""
    draw, positions, theta = Draw("rope"), [0, 1, 2, 7, 40], 10000.0
    x = draw.numbers(len(positions), 2, 8)                          # [T, heads, K]
    y = torch.stack([torch.stack([rotate(head, p, theta) for head in row])
                     for row, p in zip(x, positions)])
    rope = Case("rope", "LLaMA", "Su et al. 2021",
                "x [T, heads, K] -> y: each pair (x_2i, x_2i+1) is turned by position * "
                "theta^(-2i/K) radians. Pairs are neighbours, not one number of each half.",
                {"theta": theta}, {"x": x, "positions": torch.tensor(positions)}, {"y": y})

    draw = Draw("rmsnorm")
    x = draw.numbers(4, 6) * torch.tensor([[1.0], [2.0 ** -9], [64.0], [0.0]], dtype=torch.float64)
    weight = 1 + draw.numbers(6, scale=0.5)
    norm = Case("rmsnorm", "LLaMA", "Zhang and Sennrich 2019",
                "y = weight * x / sqrt(mean(x^2) + eps) for each row of x [N, D]. eps is under "
                "the root.", {"eps": 1e-5}, {"x": x, "weight": weight},
                {"y": torch.stack([rms_norm(row, weight, 1e-5) for row in x])})

    draw, lengths, T, D = Draw("attention"), [6, 3, 1], 6, 24
    matrices = {name: draw.numbers(D if name in ("wq", "wo") else D // 2, D, scale=0.5)
                for name in ("wq", "wk", "wv", "wo")}
    x = torch.full((3, T, D), GARBAGE, dtype=torch.float64)
    y = torch.zeros_like(x)
    for b, length in enumerate(lengths):                            # left-padded
        x[b, T - length:] = draw.numbers(length, D, scale=2.0)
        y[b, T - length:] = attention(x[b, T - length:], matrices, 4, 2, theta)
    key_mask = mask_of(lengths, T).flip(1)
    attend = Case("attention", "LLaMA", "softmax(q k^T / sqrt(K)) v",
                  "y [B, T, D] = Wo attention(q, k, v) of x, which is left-padded. key_mask is "
                  "True on real tokens, whose positions in each row count from 0. q and k are "
                  "rotated as in rope. Query head i uses key head i // (n_heads / n_kv_heads). A "
                  "token sees itself and the tokens before it. y is 0 in the padding.",
                  {"n_heads": 4, "n_kv_heads": 2, "theta": theta},
                  {"x": x, "key_mask": key_mask} | matrices, {"y": y})
    return [rope, norm, attend]


def model_cases() -> list[Case]:
    """The whole model: logits, log-probabilities of response tokens, and their rewards."""
    w, given = weights(), batch("logits")
    rows = [given.row(b)[0] for b in range(3)]
    logits = Case("logits", "LLaMA", "h, logits",
                  "h = E[tokens]. In each layer h <- h + attention(RMSNorm(h)) as in the cases "
                  "attention and rmsnorm, then h <- h + W2 (silu(W1 u) * W3 u), u = RMSNorm(h), "
                  "silu(a) = a / (1 + exp(-a)). logits [B, S, V] = output RMSNorm(h). Matrices are "
                  "[out, in]: y = W x. tokens are right-padded with random ids; logits are 0 "
                  "in the padding. A decoder with a KV cache must give the same logits.", {},
                  {"tokens": given.tokens, "lengths": torch.tensor([len(ids) for ids in rows])},
                  {"logits": padded([hidden(ids, w) @ w["output.weight"].T for ids in rows],
                                    WIDTH)}, model=True, float64=1e-11, float32=2e-5)

    given, options = batch("response-logp"), {"temperature": 1.25}
    logp = response_logp(given, w, **options)
    scored = Case("response-logp", "2.2", "log pi",
                  "logp [B, T]: log softmax(logits / temperature) of response token t, from the "
                  "logits one position BEFORE the token. 0 in the padding.", options,
                  given._asdict(),
                  {"logp": padded(logp, max(RESPONSES))}, model=True, float64=1e-11, float32=2e-5)

    given, draw = batch("token-rewards"), Draw("token-rewards")
    v, options = draw.numbers(CONFIG["dim"]), {"bias": 0.25, "mean": -0.5, "scale": 1.5}
    rewards = []
    for b in range(3):
        ids, start = given.row(b)
        rewards.append([v @ x + options["bias"] for x in hidden(ids, w)[start:]])
    calibrated = [[(r - options["mean"]) / options["scale"] for r in row] for row in rewards]
    reward = Case("token-rewards", "2.2", "(1)",
                  "r [B, T] = v . h_t + bias, from the hidden state at response token t's OWN "
                  "position. R [B] = sum_t r_t. calibrated [B, T] = (r - mean) / scale. r and "
                  "calibrated are 0 in the padding. last [B] = v . h + bias at the last token "
                  "only: the R of a sequence-level reward model.",
                  options, given._asdict() | {"v": v},
                  {"r": padded(rewards, max(RESPONSES)),
                   "R": torch.stack([sum(row) for row in rewards]),
                   "calibrated": padded(calibrated, max(RESPONSES)),
                   "last": torch.stack([number(row[-1]) for row in rewards])},
                  model=True, float64=1e-11, float32=2e-5)
    return [logits, scored, reward]


def cases() -> list[Case]:
    return part_cases() + model_cases()
