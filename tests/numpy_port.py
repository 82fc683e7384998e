"""A port of the method to numpy, which uses only the golden fixtures and no code of the project.

    python -m fgrlhf.golden write DIR
    python tests/numpy_port.py DIR [float32]        DIR/inputs -> DIR/outputs, float64 by default
    python -m fgrlhf.golden check DIR

Its gradients are derived by hand and its alignment is a recurrence. (The fixtures come from loops
and autograd, the project uses fused kernels.) It shows what a port to another language must do, and
it is a slow reference of the method. Each function has the name of a case, takes the inputs and
options of the case, and returns the outputs.
"""

import functools
import json
import re
import sys
from pathlib import Path

import numpy as np

# ----- tokenizer ----------------------------------------------------------------------------------

BLANK = "▁"


def tokenizer_encode(pieces, texts, bos_id, eos_id):
    scores = {text: (score, id) for id, (text, score, kind) in enumerate(pieces) if kind == "text"}
    of_byte = {int(text[3:5], 16): id for id, (text, _, kind) in enumerate(pieces)
               if kind == "byte"}
    rows = []
    for text in texts:
        # (text, may it join?): no piece may contain a literal U+2581 of the text.
        row = [(BLANK, True) if c == " " else (c, c != BLANK) for c in " " * bool(text) + text]
        while True:
            unions = [(-scores[a + b][0], k) for k, ((a, x), (b, y)) in enumerate(zip(row, row[1:]))
                      if x and y and a + b in scores]
            if not unions:
                break
            _, k = min(unions)                                  # highest score, then left-most
            row[k:k + 2] = [(row[k][0] + row[k + 1][0], True)]
        ids = [bos_id]
        for piece, ordinary in row:
            known = ordinary and piece in scores
            ids += [scores[piece][1]] if known else [of_byte[b] for b in piece.encode()]
        rows.append(ids + [eos_id])
    return {"ids": np.array([id for ids in rows for id in ids]),
            "lengths": np.array([len(ids) for ids in rows])}


def second_bytes(lead):
    """(bytes of the character, least and largest second byte); (1, 0, 0) if no byte may follow."""
    if 0xC2 <= lead <= 0xDF:
        return 2, 0x80, 0xBF
    if 0xE0 <= lead <= 0xEF:
        return 3, 0xA0 if lead == 0xE0 else 0x80, 0x9F if lead == 0xED else 0xBF
    if 0xF0 <= lead <= 0xF4:
        return 4, 0x90 if lead == 0xF0 else 0x80, 0x8F if lead == 0xF4 else 0xBF
    return 1, 0, 0


def utf8(data):
    """[(code point, number of bytes)]. Each maximal part of an invalid character gives U+FFFD."""
    found, at = [], 0
    while at < len(data):
        size, low, high = second_bytes(data[at])
        end = at + 1
        while end < min(at + size, len(data)) and low <= data[end] <= high:
            end, low, high = end + 1, 0x80, 0xBF
        whole = end - at == size and (size > 1 or data[at] < 0x80)
        point = data[at] & (0x7F >> (size if size > 1 else 0))
        for byte in data[at + 1:end]:
            point = point << 6 | byte & 0x3F
        found.append((point if whole else 0xFFFD, end - at))
        at = end
    return found


def tokenizer_decode(pieces, ids):
    characters, lengths, spans = [], [], []
    for row in ids:
        surfaces, first = [], True
        for id in row:
            text, _, kind = pieces[id]
            if kind == "byte":
                surface = bytes([int(text[3:5], 16)])
            else:
                surface = b"" if kind == "control" else text.replace(BLANK, " ").encode()
            if surface and first:
                first = False
                if kind == "text" and surface[:1] == b" ":
                    surface = surface[1:]
            surfaces.append(surface)
        decoded = utf8(b"".join(surfaces))
        home = [k for k, (_, size) in enumerate(decoded) for _ in range(size)]   # per byte
        at = 0
        for surface in surfaces:
            inside = home[at:at + len(surface)]
            at += len(surface)
            here = home[at - 1] + 1 if at else 0
            spans.append((inside[0], inside[-1] + 1) if inside else (here, here))
        characters += [point for point, _ in decoded]
        lengths.append(len(decoded))
    return {"characters": np.array(characters), "lengths": np.array(lengths),
            "spans": np.array(spans)}


# ----- alignment ----------------------------------------------------------------------------------

def best_path(a, b, edit, run, substitution):
    """Returns (matches, number of edits) of the path that is least by (cost, runs, moves)."""
    @functools.cache
    def best(i, j, in_run):
        if i == len(a) and j == len(b):
            return 0, 0, ()
        moves = []
        if i < len(a) and j < len(b) and a[i] == b[j]:
            moves.append((0, 1, 1))
        if i < len(a) and j < len(b) and a[i] != b[j] and substitution:
            moves.append((1, 1, 1))
        if i < len(a):
            moves.append((2, 1, 0))
        if j < len(b):
            moves.append((3, 0, 1))
        ways = []
        for move, down, right in moves:
            cost, runs, rest = best(i + down, j + right, move > 0)
            opens = move > 0 and not in_run
            ways.append((cost + (move > 0) * edit + opens * run, runs + opens, (move, *rest)))
        return min(ways)

    matches, i, j, moves = [], 0, 0, best(0, 0, False)[2]
    for move in moves:
        if move == 0:
            matches.append((i, j))
        i, j = i + (move != 3), j + (move != 2)
    return matches, sum(move > 0 for move in moves)


def unpaired(pairs, side, length):
    return [k not in {pair[side] for pair in pairs} for k in range(length)]


def flags_and_pairs(rows):
    return {"original": np.array([flag for changed, _, _ in rows for flag in changed]),
            "edited": np.array([flag for _, changed, _ in rows for flag in changed]),
            "pairs": np.array([(n, *pair) for n, (_, _, pairs) in enumerate(rows)
                               for pair in pairs])}


def align_token(original, edited):
    rows, distances = [], []
    for a, b in zip(original, edited):
        pairs, distance = best_path(a, b, edit=1, run=0, substitution=True)
        rows.append((unpaired(pairs, 0, len(a)), unpaired(pairs, 1, len(b)), pairs))
        distances.append(distance)
    return flags_and_pairs(rows) | {"distance": np.array(distances)}


def gap_credit(original, edited):
    rows = []
    for a, b in zip(original, edited):
        pairs, _ = best_path(a, b, edit=1, run=0, substitution=True)
        minus, plus = unpaired(pairs, 0, len(a)), unpaired(pairs, 1, len(b))
        i = j = 0
        for next_i, next_j in [*pairs, (len(a), len(b))]:
            if next_j > j and next_i == i and i < len(a):       # only inserted
                minus[i] = True
            if next_i > i and next_j == j and j < len(b):       # only deleted
                plus[j] = True
            i, j = next_i + 1, next_j + 1
        rows.append((minus, plus, [(i, j) for i, j in pairs if not minus[i] and not plus[j]]))
    return flags_and_pairs(rows)


UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u4e00-\u9fff"             # Thai, Lao, Japanese, Chinese
MARKS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"                       # of Thai


def split_words(text):
    """(key, start, end) of each word, and of the end of the text as a last word."""
    words = []
    for found in re.finditer(f"[{UNSPACED}][{MARKS}]*|[^\\s{UNSPACED}]+", text):
        low = found[0].lower()
        first, last = 0, len(low)
        while first < last and not low[first].isalnum():
            first += 1
        while first < last and not low[last - 1].isalnum() and low[last - 1] < "\u0e00":
            last -= 1
        words.append((low[first:last] or low, *found.span()))
    return [*words, (None, len(text), len(text) + 1)]


def words_of_pieces(spans, words):
    """(first word, last word) that each piece belongs to."""
    found = []
    for start, end in spans:
        first = next(k for k, word in enumerate(words) if word[2] > start)
        last = max([first] + [k for k, word in enumerate(words) if word[1] < end])
        found.append((first, last))
    return found


def align_word(original, edited, original_spans, edited_spans):
    rows, distances = [], []
    for texts, spans in zip(zip(original, edited), zip(original_spans, edited_spans)):
        words = [split_words(text) for text in texts]
        matches, distance = best_path(*(tuple(key for key, _, _ in side) for side in words),
                                      edit=1, run=2, substitution=False)
        homes = [words_of_pieces(*both) for both in zip(spans, words)]
        lost = [unpaired(matches, side, len(words[side])) for side in (0, 1)]
        changed = [[any(lost[side][first:last + 1]) for first, last in homes[side]]
                   for side in (0, 1)]
        pairs = []
        for match in matches:
            inside = [[p for p, home in enumerate(homes[side]) if home[0] == match[side]]
                      for side in (0, 1)]
            shown = [[texts[side][slice(*spans[side][p])].lower() for p in inside[side]]
                     for side in (0, 1)]
            shown = [[piece.strip() or piece for piece in side] for side in shown]
            for p, q in best_path(*shown, edit=1, run=0, substitution=True)[0]:
                i, j = inside[0][p], inside[1][q]
                if not changed[0][i] and not changed[1][j]:
                    pairs.append((i, j))
        rows.append((*changed, pairs))
        distances.append(distance)
    return flags_and_pairs(rows) | {"distance": np.array(distances)}


# ----- the transformer, forward and backward ------------------------------------------------------

def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rms_norm_backward(dy, x, weight, eps):
    """(dx, dweight). s = 1 / sqrt(mean(x^2) + eps), g = dy weight, dx = s (g - x s^2 mean(g x))."""
    s = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    g = dy * weight
    dx = s * (g - x * s * s * (g * x).mean(-1, keepdims=True))
    return dx, (dy * x * s).reshape(-1, x.shape[-1]).sum(0)


def angles(positions, width, theta, dtype):
    """cos and sin [..., 1, K/2]."""
    angle = positions[..., None, None] * theta ** (-np.arange(0, width, 2) / width)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def rotate(x, cos, sin):
    """Turns the pairs of x [..., heads, K]. With -sin it is the inverse, which is the gradient."""
    y = np.empty_like(x)
    y[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    y[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return y


def outer(dy, x):
    """The gradient of W in y = x W^T."""
    return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def attend(x, wq, wk, wv, wo, n_heads, n_kv_heads, turn, visible):
    """x [B, T, D] -> (y, tape for backward). visible [B or 1, T, T]: query t may see key s."""
    B, T, D = x.shape
    K, shared = D // n_heads, n_heads // n_kv_heads
    q = rotate((x @ wq.T).reshape(B, T, n_heads, K), *turn)
    k = rotate((x @ wk.T).reshape(B, T, n_kv_heads, K), *turn)
    k = np.repeat(k, shared, axis=2)
    v = np.repeat((x @ wv.T).reshape(B, T, n_kv_heads, K), shared, axis=2)
    scores = np.einsum("bthk,bshk->bhts", q, k) / K ** 0.5
    scores = np.where(visible[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshk->bthk", p, v).reshape(B, T, D)
    return mixed @ wo.T, (x, q, k, v, p, mixed, turn)


def attend_backward(dy, tape, wq, wk, wv, wo, n_heads, n_kv_heads):
    """Returns (dx, the gradients of the four matrices)."""
    x, q, k, v, p, mixed, (cos, sin) = tape
    B, T, D = x.shape
    K, shared = D // n_heads, n_heads // n_kv_heads
    grads = {"wo": outer(dy, mixed)}
    dmixed = (dy @ wo).reshape(B, T, n_heads, K)
    dp = np.einsum("bthk,bshk->bhts", dmixed, v)
    dscores = p * (dp - (dp * p).sum(-1, keepdims=True)) / K ** 0.5
    summed = lambda g: g.reshape(B, T, n_kv_heads, shared, K).sum(3)
    dq = rotate(np.einsum("bhts,bshk->bthk", dscores, k), cos, -sin)
    dk = rotate(summed(np.einsum("bhts,bthk->bshk", dscores, q)), cos, -sin)
    dv = summed(np.einsum("bhts,bthk->bshk", p, dmixed))
    dx = 0
    for name, weight, g in (("wq", wq, dq), ("wk", wk, dk), ("wv", wv, dv)):
        g = g.reshape(B, T, -1)
        grads[name] = outer(g, x)
        dx = dx + g @ weight
    return dx, grads


class Model:
    """The tiny LLaMA of the fixtures, with its config and its weights by name."""

    def __init__(self, config, weights):
        self.config, self.weights = config, weights
        self.heads = {"n_heads": config["n_heads"], "n_kv_heads": config["n_kv_heads"]}

    def part(self, layer, module, *names):
        at = f"layers.{layer}.{module}."
        return [self.weights[f"{at}{name}.weight"] for name in names]

    def norm(self, name, h):
        return rms_norm(h, self.weights[name + ".weight"], self.config["norm_eps"])

    def hidden(self, tokens):
        """Returns (hidden states [B, S, D], tape for backward). Padding is on the right."""
        c, S, tape = self.config, tokens.shape[1], []
        h = self.weights["tok_embeddings.weight"][tokens]
        turn = angles(np.arange(S)[None], c["dim"] // c["n_heads"], c["rope_theta"], h.dtype)
        causal = np.tri(S, dtype=bool)[None]
        for layer in range(c["n_layers"]):
            before = h
            y, kept = attend(self.norm(f"layers.{layer}.attention_norm", h),
                             *self.part(layer, "attention", "wq", "wk", "wv", "wo"),
                             **self.heads, turn=turn, visible=causal)
            middle = h = h + y
            w1, w2, w3 = self.part(layer, "feed_forward", "w1", "w2", "w3")
            u = self.norm(f"layers.{layer}.ffn_norm", h)
            a, b = u @ w1.T, u @ w3.T
            gate = a / (1 + np.exp(-a))
            h = h + (gate * b) @ w2.T
            tape.append((before, kept, middle, u, a, b, gate))
        return self.norm("norm", h), (tokens, tape, h)

    def backward(self, dy, kept):
        """The gradients of all weights except the output matrix, by name."""
        tokens, tape, last = kept
        grads = {}

        def norm_backward(name, dy, x):
            dx, grads[name + ".weight"] = rms_norm_backward(
                dy, x, self.weights[name + ".weight"], self.config["norm_eps"])
            return dx

        dh = norm_backward("norm", dy, last)
        for layer in reversed(range(self.config["n_layers"])):
            before, kept, middle, u, a, b, gate = tape[layer]
            w1, w2, w3 = self.part(layer, "feed_forward", "w1", "w2", "w3")
            dgated = dh @ w2
            share = 1 / (1 + np.exp(-a))
            da = dgated * b * share * (1 + a * (1 - share))     # silu' = sigma (1 + a (1 - sigma))
            db = dgated * gate
            found = {"w2": outer(dh, gate * b), "w1": outer(da, u), "w3": outer(db, u)}
            grads |= {f"layers.{layer}.feed_forward.{n}.weight": g for n, g in found.items()}
            dh = dh + norm_backward(f"layers.{layer}.ffn_norm", da @ w1 + db @ w3, middle)
            dx, found = attend_backward(
                dh, kept, *self.part(layer, "attention", "wq", "wk", "wv", "wo"), **self.heads)
            grads |= {f"layers.{layer}.attention.{n}.weight": g for n, g in found.items()}
            dh = dh + norm_backward(f"layers.{layer}.attention_norm", dx, before)
        table = np.zeros_like(self.weights["tok_embeddings.weight"])
        np.add.at(table, tokens, dh)
        return grads | {"tok_embeddings.weight": table}


def rope(x, positions, theta):
    return {"y": rotate(x, *angles(positions, x.shape[-1], theta, x.dtype))}


def rmsnorm(x, weight, eps):
    return {"y": rms_norm(x, weight, eps)}


def attention(x, key_mask, wq, wk, wv, wo, n_heads, n_kv_heads, theta):
    T = x.shape[1]
    positions = np.maximum(key_mask.cumsum(-1) - 1, 0)
    turn = angles(positions, x.shape[-1] // n_heads, theta, x.dtype)
    visible = np.tri(T, dtype=bool) & key_mask[:, None, :]
    visible |= np.eye(T, dtype=bool)                            # every query needs a key
    y, _ = attend(x, wq, wk, wv, wo, n_heads, n_kv_heads, turn, visible)
    return {"y": np.where(key_mask[..., None], y, 0)}


def logits(model, tokens, lengths):
    z = model.hidden(tokens)[0] @ model.weights["output.weight"].T
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    return {"logits": np.where(real[..., None], z, 0)}


def locate(prompt_lengths, response_lengths):
    """Returns mask [B, T], and row and position [N] of each real response token."""
    mask = np.arange(response_lengths.max()) < response_lengths[:, None]
    row, step = mask.nonzero()
    return mask, row, prompt_lengths[row] + step


def spread(mask, values):
    """[N] -> [B, T], 0 in the padding."""
    result = np.zeros(mask.shape, values.dtype)
    result[mask] = values
    return result


def response_logp(model, tokens, prompt_lengths, response_lengths, temperature):
    mask, row, at = locate(prompt_lengths, response_lengths)
    h = model.hidden(tokens)[0][row, at - 1]
    logps = log_softmax(h @ model.weights["output.weight"].T / temperature)
    return {"logp": spread(mask, logps[np.arange(len(at)), tokens[row, at]])}


def token_rewards(model, tokens, prompt_lengths, response_lengths, v, bias, mean, scale):
    mask, row, at = locate(prompt_lengths, response_lengths)
    h = model.hidden(tokens)[0]
    r = spread(mask, h[row, at] @ v + bias)
    ends = prompt_lengths + response_lengths - 1
    return {"r": r, "R": r.sum(-1), "calibrated": np.where(mask, (r - mean) / scale, 0),
            "last": h[np.arange(len(ends)), ends] @ v + bias}


# ----- likelihoods --------------------------------------------------------------------------------

def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def chosen(logps, targets):
    return logps[np.arange(len(targets)), targets]


def logp_backward(g, logps, targets, hidden, head, temperature=1.0):
    """The gradients of sum_i g_i logp_i, from dz = g (onehot - p)."""
    dz = -np.exp(logps) * g[:, None]
    dz[np.arange(len(targets)), targets] += g
    dz /= temperature
    return {"grad_hidden": dz @ head, "grad_head": dz.T @ hidden}


def linear_logp(hidden, head, targets, weights, temperature):
    z = hidden @ head.T / temperature
    logps = log_softmax(z)
    return {"logp": chosen(logps, targets), "logsumexp": z[:, 0] - logps[:, 0],
            "entropy": -(np.exp(logps) * logps).sum(-1)} \
        | logp_backward(weights, logps, targets, hidden, head, temperature)


def cross_entropy(hidden, head, targets, mask):
    logps = log_softmax(hidden @ head.T)
    weights = mask.astype(hidden.dtype) / int(mask.sum())
    return {"loss": -(weights * chosen(logps, targets)).sum()} \
        | logp_backward(-weights, logps, targets, hidden, head)


def inverse_cdf(logits, uniform):
    return {"token": (np.exp(log_softmax(logits)).cumsum(-1) <= uniform[:, None]).sum(-1)}


def kl_estimates(logp, logp_ref, mask):
    log_r = (logp_ref - logp)[mask]
    return {"kl_k1": -log_r.mean(), "kl_k3": (np.exp(log_r) - 1 - log_r).mean()}


def exact_kl(hidden, head, hidden_ref, head_ref, weights, temperature):
    p = log_softmax(hidden @ head.T / temperature)
    gap = p - log_softmax(hidden_ref @ head_ref.T / temperature)
    kl = (np.exp(p) * gap).sum(-1)
    dz = weights[:, None] * np.exp(p) * (gap - kl[:, None]) / temperature
    return {"kl": kl, "grad_hidden": dz @ head, "grad_head": dz.T @ hidden}


# ----- reward losses ------------------------------------------------------------------------------

def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def token_loss(rewards_chosen, rewards_rejected, plus_mask, minus_mask, unchanged, lengths, reduce,
               u0, u0_weight, token_weight):
    shares, sums = [], []                                       # shares: |d margin / d reward|
    for mask, r, T in ((plus_mask, rewards_chosen, lengths[:, :1]),
                       (minus_mask, rewards_rejected, lengths[:, 1:])):
        inside = np.arange(mask.shape[1]) < T
        share = (inside if reduce == "response" else mask).astype(r.dtype)
        if reduce == "mean":
            share /= np.maximum(share.sum(-1, keepdims=True), 1)
        if reduce in ("share", "response"):
            share /= T.astype(r.dtype)
        shares.append(share)
        sums.append((share * np.where(share > 0, r, 0)).sum(-1))
    margin = sums[0] - sums[1]
    counted = plus_mask.any(-1) | minus_mask.any(-1)
    # int, because float32 divided by numpy's int64 would become float64.
    pairs, tokens, kept = (int(n) for n in (counted.sum(), plus_mask.sum() + minus_mask.sum(),
                                            len(unchanged)))
    pull = counted * sigmoid(-margin) / pairs
    grads = [-pull[:, None] * shares[0], pull[:, None] * shares[1]]

    token = 0
    for k, (mask, sign, r) in enumerate(((plus_mask, 1, rewards_chosen),
                                         (minus_mask, -1, rewards_rejected))):
        token = token + np.log1p(np.exp(-sign * r[mask])).sum()
        grads[k][mask] -= sign * token_weight * sigmoid(-sign * r[mask]) / tokens
    at = [(unchanged[:, 0], unchanged[:, side]) for side in (1, 2)]
    a, b = rewards_chosen[at[0]], rewards_rejected[at[1]]
    term, slopes = {
        "difference": lambda: ((a - b) ** 2, (2 * (a - b), 2 * (b - a))),
        "anchor": lambda: ((a * a + b * b) / 2, (a, b)),
        "kept": lambda: ((np.log1p(np.exp(-a)) + np.log1p(np.exp(-b))) / 2,
                         (-sigmoid(-a) / 2, -sigmoid(-b) / 2))}[u0]()
    square = term.sum()
    for k, slope in enumerate(slopes):
        np.add.at(grads[k], at[k], u0_weight * slope / kept)

    parts = {"bt": np.log1p(np.exp(-margin[counted])).sum() / pairs,
             "u0": u0_weight * square / kept, "token": token_weight * token / tokens}
    return parts | {"loss": sum(parts.values()), "margin": margin,
                    "grad_rewards_chosen": grads[0], "grad_rewards_rejected": grads[1]}


def sequence_loss(chosen, rejected):
    margin = chosen - rejected
    slope = -sigmoid(-margin) / len(margin)
    return {"loss": np.log1p(np.exp(-margin)).mean(), "margin": margin,
            "grad_chosen": slope, "grad_rejected": -slope}


# ----- advantages ---------------------------------------------------------------------------------

def standardise(x, mask, how, eps):
    real = x[mask]
    if how == "mean-std":
        real = real - real.mean()
    return {"y": spread(mask, real / (np.sqrt((real * real).mean()) + eps))}


def advantages(rewards, logp_old, logp_ref, mask, beta, eps):
    penalised = np.where(mask, rewards - beta * (logp_old - logp_ref), 0)
    return {"penalised": penalised,
            "advantages": standardise(penalised, mask, "rms", eps)["y"]}


def reward_to_go(rewards, mask, gamma):
    return {"G": discounted(np.where(mask, rewards, 0), gamma)}


def discounted(x, factor):
    """Solves y_t = x_t + factor y_t+1 along each row."""
    y = np.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        y[:, t] = x[:, t] + (factor * y[:, t + 1] if t + 1 < x.shape[1] else 0)
    return y


def gae(rewards, values, mask, gamma, lam):
    r, V = np.where(mask, rewards, 0), np.where(mask, values, 0)
    later = np.concatenate([V[:, 1:], np.zeros_like(V[:, :1])], axis=1)
    found = discounted(r + gamma * later - V, gamma * lam)
    return {"advantages": found, "returns": found + V}


# ----- policy -------------------------------------------------------------------------------------

def surrogate(logp, logp_old, advantages, clip_eps):
    """Returns equation (7) with its statistics, and the gradient with respect to logp."""
    ratio = np.exp(logp - logp_old)
    free = ratio * advantages
    bound = np.clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantages
    slope = np.where(free > bound, 0, -free / len(logp))
    return {"loss": -np.minimum(free, bound).mean(),
            "clip_fraction": (np.abs(ratio - 1) > clip_eps).astype(logp.dtype).mean(),
            "kl_k1": (logp_old - logp).mean(),
            "kl_k3": (ratio - 1 - (logp - logp_old)).mean()}, slope


def clipped_loss(logp, logp_old, advantages, mask, clip_eps):
    out, slope = surrogate(logp[mask], logp_old[mask], advantages[mask], clip_eps)
    return out | {"grad_logp": spread(mask, slope)}


def linear_ppo(hidden, head, targets, logp_old, advantages, clip_eps, temperature):
    logps = log_softmax(hidden @ head.T / temperature)
    logp = chosen(logps, targets)
    out, slope = surrogate(logp, logp_old, advantages, clip_eps)
    return out | {"logp": logp, "entropy": -(np.exp(logps) * logps).sum(-1).mean()} \
        | logp_backward(slope, logps, targets, hidden, head, temperature)


def value_loss(values, values_old, returns, mask, clip_eps):
    V, old, G = values[mask], values_old[mask], returns[mask]
    moved = old + np.clip(V - old, -clip_eps, clip_eps)
    free, bound = (V - G) ** 2, (moved - G) ** 2
    inside = np.abs(V - old) < clip_eps
    slope = np.where(free >= bound, V - G, np.where(inside, moved - G, 0)) / len(V)
    return {"loss": np.maximum(free, bound).mean() / 2, "grad_values": spread(mask, slope)}


def clip_factor(norm, max_norm):
    return np.minimum(1, max_norm / (norm + 1e-6))


def clip_gradients(g, max_norm):
    norm = np.sqrt((g * g).sum(-1))
    return {"norm": norm, "clipped": g * clip_factor(norm, max_norm)[:, None]}


def adamw(x, g, m, v, lr, beta1, beta2, eps, weight_decay, step):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    size = m / (1 - beta1 ** step) / (np.sqrt(v / (1 - beta2 ** step)) + eps)
    return {"x": x * (1 - lr * weight_decay) - lr * size, "m": m, "v": v}


def muon(lr, momentum, a, b, c, steps, **matrices):
    found = {}
    for name in ("tall", "wide"):
        x, g, m = (matrices[f"{letter}_{name}"] for letter in "xgm")
        m = momentum * m + (1 - momentum) * g
        X = momentum * m + (1 - momentum) * g
        X = X / np.sqrt((X * X).sum())
        for _ in range(steps):
            square = X @ X.T
            X = a * X + (b * square + c * square @ square) @ X
        found |= {f"x_{name}": x - lr * 0.2 * max(x.shape) ** 0.5 * X, f"m_{name}": m}
    return found


def ppo_step(model, tokens, prompt_lengths, response_lengths, logp_old, logp_ref, rewards, beta,
             standardise_eps, clip_eps, temperature, max_norm, lr, **adam):
    mask, row, at = locate(prompt_lengths, response_lengths)
    advantage = advantages(rewards, logp_old, logp_ref, mask, beta, standardise_eps)["advantages"]
    hidden, tape = model.hidden(tokens)
    head, before, targets = model.weights["output.weight"], hidden[row, at - 1], tokens[row, at]
    logps = log_softmax(before @ head.T / temperature)
    logp = chosen(logps, targets)
    out, slope = surrogate(logp, logp_old[mask], advantage[mask], clip_eps)
    found = logp_backward(slope, logps, targets, before, head, temperature)
    dhidden = np.zeros_like(hidden)
    np.add.at(dhidden, (row, at - 1), found["grad_hidden"])
    grads = model.backward(dhidden, tape) | {"output.weight": found["grad_head"]}
    norm = np.sqrt(sum((g * g).sum() for g in grads.values()))
    factor = clip_factor(norm, max_norm)
    new = {name: adamw(weight, grads[name] * factor, 0, 0, lr, step=1, **adam)["x"]
           for name, weight in model.weights.items()}
    return out | {"logp": spread(mask, logp), "advantages": advantage, "gradient_norm": norm} \
        | {f"grad.{name}": g for name, g in grads.items()} \
        | {f"new.{name}": x for name, x in new.items()}


# ----- the folder ---------------------------------------------------------------------------------

def function_of(case):
    """Finds the function of a case by its name. Variants of a case differ only in their options."""
    for ending in ("-ours", "-per-token", "-kept", "-paper", "-share", "-one-token", "-rms",
                   "-mean-std"):
        case = case.removesuffix(ending)
    return globals()[case.replace("-", "_")]


def read(folder, entry, dtype):
    if entry["dtype"] == "json":
        return json.loads((folder / entry["file"]).read_text(encoding="utf-8"))
    array = np.load(folder / entry["file"])
    return array.astype(dtype) if entry["dtype"] == "float32" else array


def answer(folder, manifest, case, dtype=np.float64):
    """Computes the outputs of one case of the manifest."""
    inputs = {name: read(folder, entry, dtype) for name, entry in case["inputs"].items()}
    if case["model"]:
        own = manifest["model"]
        inputs["model"] = Model(own["config"], {name: read(folder, entry, dtype)
                                                for name, entry in own["weights"].items()})
    return function_of(case["name"])(**inputs, **case["options"])


def main(folder, dtype=np.float64):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for case in manifest["cases"]:
        target = folder / "outputs" / case["name"]
        target.mkdir(parents=True, exist_ok=True)
        for name, array in answer(folder, manifest, case, dtype).items():
            np.save(target / f"{name}.npy", array)


if __name__ == "__main__":
    given = sys.argv[1:]
    if (len(given) not in (1, 2) or not set(given[1:]) <= {"float64", "float32"}
            or not (Path(given[0]) / "manifest.json").is_file()):
        print("error: expected DIR, or DIR float32, with the fixtures in DIR, got "
              f"{' '.join(given) or 'nothing'}; write them by python -m fgrlhf.golden write DIR",
              file=sys.stderr)
        sys.exit(2)
    main(Path(given[0]), np.dtype(given[1] if given[1:] else "float64"))
