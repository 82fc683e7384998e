"""Errors to plant in tests/numpy_port.py: at least one of each kind for each golden case.

    {case: {the error: (a text that the port contains exactly once, its replacement)}}

There are four kinds of error:
    shift   another token, position, pair or order
    mask    something is counted that should not be, or the reverse
    sign    a sign is wrong, or two sides are swapped
    scale   a factor or a divisor is wrong
"""

PLANTS = {
    "tokenizer-encode": {
        "shift: no blank first": (
            '" " * bool(text) + text]',
            "text]"),
        "mask: a literal U+2581 may join": (
            "(c, c != BLANK)",
            "(c, True)"),
        "sign: the lowest score first": (
            "[(-scores[a + b][0], k)",
            "[(scores[a + b][0], k)"),
        "scale: bytes are off by one": (
            "else [of_byte[b] for",
            "else [of_byte[b] + 1 for"),
    },
    "tokenizer-decode": {
        "shift: spans end early": (
            "(inside[0], inside[-1] + 1)",
            "(inside[0], inside[-1])"),
        "mask: the first blank stays": (
            'if kind == "text" and surface[:1] == b" "',
            "if False"),
        "mask: broken characters vanish": (
            "if whole else 0xFFFD",
            "if whole else 0"),
        "scale: any second byte": (
            "low <= data[end] <= high",
            "0x80 <= data[end] <= 0xBF"),
        "sign: the first and the last byte swapped": (
            "(inside[0], inside[-1] + 1)",
            "(inside[-1], inside[0] + 1)"),
    },
    "align-token": {
        "shift: pairs": (
            "matches.append((i, j))",
            "matches.append((i, j + 1))"),
        "mask: runs are not counted": (
            "runs + opens, (move",
            "runs, (move"),
        "sign: left-most path": (
            "return min(ways)",
            "return min(ways, key=lambda w: (*w[:2], [-m for m in w[2]]))"),
        "scale: substitution costs 2": (
            "(move > 0) * edit",
            "(move > 0) * edit * (1 + (move == 1))"),
    },
    "gap-credit": {
        "shift: the token before the gap": (
            "minus[i] = True",
            "minus[max(i - 1, 0)] = True"),
        "mask: deletions are not charged": (
            "plus[j] = True",
            "pass"),
        "mask: pairs keep a credited token": (
            "if not minus[i] and not plus[j]",
            "if not minus[i]"),
        "sign: the sides swapped": (
            "rows.append((minus, plus,",
            "rows.append((plus, minus,"),
        "scale: two tokens a gap": (
            "minus[i] = True",
            "minus[i:i + 2] = [True] * len(minus[i:i + 2])"),
    },
    "align-word": {
        "shift: pieces begin a word early": (
            "if word[2] > start)",
            "if word[2] >= start)"),
        "mask: only a piece's first word": (
            "lost[side][first:last + 1]",
            "lost[side][first:first + 1]"),
        "sign: punctuation is kept": (
            "low[first:last] or low",
            "low"),
        "scale: a run costs nothing": (
            "run=2,",
            "run=0,"),
    },
    "rope": {
        "shift: positions count from 1": (
            "angle = positions[",
            "angle = (positions + 1)["),
        "mask: halves instead of pairs": (
            "y[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin",
            "x = x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)\n    "
            "y[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin"),
        "sign: turned back": (
            "* cos - x[..., 1::2] * sin",
            "* cos + x[..., 1::2] * sin"),
        "scale: exponents": (
            "np.arange(0, width, 2) / width",
            "np.arange(0, width, 2) / (width - 1)"),
    },
    "rmsnorm": {
        "shift: eps outside the root": (
            "return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)",
            "return x / (np.sqrt((x * x).mean(-1, keepdims=True)) + eps)"),
        "mask: the mean is removed": (
            "return x / np.sqrt((x",
            "x = x - x.mean(-1, keepdims=True)\n    return x / np.sqrt((x"),
        "sign: weight": (
            "+ eps) * weight\n",
            "+ eps) * -weight\n"),
        "scale: sum for mean": (
            "return x / np.sqrt((x * x).mean(",
            "return x / np.sqrt((x * x).sum("),
    },
    "attention": {
        "shift: sees one ahead": (
            "visible = np.tri(T, dtype=bool)",
            "visible = np.tri(T, k=1, dtype=bool)"),
        "mask: padding is seen": (
            " & key_mask[:, None, :]",
            " & np.ones_like(key_mask)[:, None, :]"),
        "mask: key heads in another order": (
            "k = np.repeat(k, shared, axis=2)",
            "k = np.tile(k, (1, 1, shared, 1))"),
        "sign: scores": (
            'np.einsum("bthk,bshk->bhts", q, k)',
            'np.einsum("bthk,bshk->bhts", -q, k)'),
        "scale: no root of K": (
            ", q, k) / K ** 0.5",
            ", q, k) / K"),
    },
    "logits": {
        "shift: tokens": (
            '"tok_embeddings.weight"][tokens]',
            '"tok_embeddings.weight"][np.roll(tokens, 1, 1)]'),
        "mask: not causal": (
            "causal = np.tri(S, dtype=bool)",
            "causal = np.ones((S, S), dtype=bool)"),
        "mask: logits of the padding": (
            "np.where(real[..., None], z, 0)",
            "z"),
        "sign: residual": (
            "middle = h = h + y",
            "middle = h = h - y"),
        "scale: silu without its input": (
            "gate = a / (1",
            "gate = 1 / (1"),
    },
    "response-logp": {
        "shift: read at the token itself": (
            "[0][row, at - 1]\n    logps",
            "[0][row, at]\n    logps"),
        "mask: a token beyond the end": (
            "< response_lengths[:, None]",
            "<= response_lengths[:, None]"),
        "sign": (
            '"logp": spread(mask, logps[',
            '"logp": spread(mask, -logps['),
        "scale: no temperature": (
            '["output.weight"].T / temperature)',
            '["output.weight"].T)'),
    },
    "token-rewards": {
        "shift: read one early": (
            "h[row, at] @ v",
            "h[row, at - 1] @ v"),
        "shift: the last token but one": (
            "ends = prompt_lengths + response_lengths - 1",
            "ends = prompt_lengths + response_lengths - 2"),
        "mask: padding is calibrated": (
            "np.where(mask, (r - mean) / scale, 0)",
            "(r - mean) / scale"),
        "sign: mean": (
            "(r - mean) / scale",
            "(r + mean) / scale"),
        "scale: multiplied": (
            "(r - mean) / scale",
            "(r - mean) * scale"),
    },
    "linear-logp": {
        "shift: targets": (
            '{"logp": chosen(logps, targets), "logsumexp"',
            '{"logp": chosen(logps, targets - 1), "logsumexp"'),
        "mask: the target's own slope": (
            "dz[np.arange(len(targets)), targets] += g",
            "pass"),
        "sign: entropy": (
            '"entropy": -(np.exp(logps) * logps).sum(-1)} \\',
            '"entropy": (np.exp(logps) * logps).sum(-1)} \\'),
        "scale: gradient without temperature": (
            "dz /= temperature",
            "pass"),
    },
    "cross-entropy": {
        "shift: targets": (
            "logps = log_softmax(hidden @ head.T)",
            "logps, targets = log_softmax(hidden @ head.T), targets - 1"),
        "mask: all tokens": (
            "weights = mask.astype",
            "weights = np.ones_like(mask).astype"),
        "sign: gradient": (
            "logp_backward(-weights",
            "logp_backward(weights"),
        "scale: mean over all": (
            "/ int(mask.sum())",
            "/ len(mask)"),
    },
    "inverse-cdf": {
        "shift: one early": (
            "<= uniform[:, None]).sum(-1)",
            "<= uniform[:, None]).sum(-1) - 1"),
        "mask: the last token is never drawn": (
            "cumsum(-1) <= uniform[:, None]).sum(-1)",
            "cumsum(-1)[:, :-2] <= uniform[:, None]).sum(-1)"),
        "sign: from the end": (
            "cumsum(-1) <= uniform[:, None])",
            "cumsum(-1) > uniform[:, None])"),
        "scale: half": (
            "<= uniform[:, None]",
            "<= uniform[:, None] / 2"),
    },
    "kl-estimates": {
        "shift: k3 without its 1": (
            "np.exp(log_r) - 1 - log_r",
            "np.exp(log_r) - log_r"),
        "mask: padding": (
            "log_r = (logp_ref - logp)[mask]",
            "log_r = (logp_ref - logp).ravel()"),
        "sign: the other direction": (
            "log_r = (logp_ref - logp)",
            "log_r = (logp - logp_ref)"),
        "scale: sum": (
            "-log_r.mean()",
            "-log_r.sum()"),
    },
    "exact-kl": {
        "shift: the slope without its mean": (
            "(gap - kl[:, None])",
            "gap"),
        "mask: the tail of the vocabulary": (
            "kl = (np.exp(p) * gap).sum(-1)",
            "kl = (np.exp(p) * gap)[:, :-1].sum(-1)"),
        "sign": (
            "gap = p - log_softmax",
            "gap = -p + log_softmax"),
        "scale: gradient without temperature": (
            "dz = weights[:, None] * np.exp(p) * (gap - kl[:, None]) / temperature",
            "dz = weights[:, None] * np.exp(p) * (gap - kl[:, None])"),
    },
    "token-loss-paper": {
        "shift: one token too many": (
            "inside = np.arange(mask.shape[1]) < T",
            "inside = np.arange(mask.shape[1]) <= T"),
        "mask: only changed tokens": (
            '(inside if reduce == "response" else mask)',
            "mask"),
        "sign: the sides swapped": (
            "grads = [-pull[:, None]",
            "grads = [pull[:, None]"),
        "scale: sum for mean": (
            'if reduce in ("share", "response")',
            "if False"),
    },
    "token-loss-share": {
        "shift: the other side's length": (
            "(plus_mask, rewards_chosen, lengths[:, :1])",
            "(plus_mask, rewards_chosen, lengths[:, 1:])"),
        "mask: all tokens": (
            '(inside if reduce == "response" else mask)',
            "inside"),
        "sign: margin": (
            "margin = sums[0] - sums[1]",
            "margin = sums[1] - sums[0]"),
        "scale: mean over U1": (
            'if reduce == "mean"',
            "if True"),
    },
    "token-loss-ours": {
        "shift: the sides of U0 swapped": (
            "for side in (1, 2)]",
            "for side in (2, 1)]"),
        "mask: only pairs with both sides": (
            "counted = plus_mask.any(-1) | minus_mask.any(-1)",
            "counted = plus_mask.any(-1) & minus_mask.any(-1)"),
        "sign: margin": (
            "margin = sums[0] - sums[1]",
            "margin = sums[1] - sums[0]"),
        "scale: the token term divided by pairs": (
            "token_weight * token / tokens",
            "token_weight * token / pairs"),
        "scale: a squared difference over U0": (
            '"anchor": lambda: ((a * a + b * b) / 2, (a, b))',
            '"anchor": lambda: ((a - b) ** 2, (2 * (a - b), 2 * (b - a)))'),
    },
    "token-loss": {
        "shift: U0 of the rejected side": (
            "unchanged[:, side]) for",
            "unchanged[:, side] - 1) for"),
        "mask: pairs in which nothing changed": (
            "counted = plus_mask.any(-1) | minus_mask.any(-1)",
            "counted = plus_mask.any(-1) | True"),
        "mask: only pairs with both sides": (
            "counted = plus_mask.any(-1) | minus_mask.any(-1)",
            "counted = plus_mask.any(-1) & minus_mask.any(-1)"),
        "sign: the sides swapped": (
            "grads = [-pull[:, None]",
            "grads = [pull[:, None]"),
        "scale: U0 divided by pairs": (
            '"u0": u0_weight * square / kept',
            '"u0": u0_weight * square / pairs'),
        "scale: slope of the square": (
            "(2 * (a - b), 2 * (b - a))",
            "(a - b, b - a)"),
    },
    "token-loss-per-token": {
        "shift: an empty side has one token": (
            "np.maximum(share.sum(-1, keepdims=True), 1)",
            "(share.sum(-1, keepdims=True) + 1)"),
        "mask: only U1+": (
            "token = token + np.log1p(np.exp(-sign * r[mask])).sum()",
            "token = token + (sign > 0) * np.log1p(np.exp(-sign * r[mask])).sum()"),
        "sign: rewards on U1- are pushed up": (
            "grads[k][mask] -= sign * token_weight",
            "grads[k][mask] -= token_weight"),
        "scale: anchor without its half": (
            "(a * a + b * b) / 2",
            "(a * a + b * b)"),
        "scale: sum for mean": (
            'if reduce == "mean"',
            "if False"),
    },
    "token-loss-kept": {
        "shift: the slope of the other side": (
            "(-sigmoid(-a) / 2, -sigmoid(-b) / 2)",
            "(-sigmoid(-b) / 2, -sigmoid(-a) / 2)"),
        "mask: only the chosen side": (
            "(np.log1p(np.exp(-a)) + np.log1p(np.exp(-b))) / 2",
            "np.log1p(np.exp(-a)) / 2"),
        "sign: kept tokens are pushed down": (
            "(-sigmoid(-a) / 2, -sigmoid(-b) / 2)",
            "(sigmoid(-a) / 2, sigmoid(-b) / 2)"),
        "scale: without the half": (
            "(np.log1p(np.exp(-a)) + np.log1p(np.exp(-b))) / 2",
            "(np.log1p(np.exp(-a)) + np.log1p(np.exp(-b)))"),
    },
    "sequence-loss": {
        "shift: pairs": (
            "margin = chosen - rejected",
            "margin = chosen - np.roll(rejected, 1)"),
        "mask: one pair is left out": (
            "np.log1p(np.exp(-margin)).mean()",
            "np.log1p(np.exp(-margin))[1:].mean()"),
        "sign": (
            "slope = -sigmoid(-margin)",
            "slope = sigmoid(-margin)"),
        "scale: sum": (
            "sigmoid(-margin) / len(margin)",
            "sigmoid(-margin)"),
    },
    "advantages": {
        "shift: KL of the token before": (
            "beta * (logp_old - logp_ref), 0)",
            "beta * np.roll(logp_old - logp_ref, 1, 1), 0)"),
        "mask: padding": (
            '"advantages": standardise(penalised, mask,',
            '"advantages": standardise(penalised, np.ones_like(mask),'),
        "sign: KL is rewarded": (
            "rewards - beta * (logp_old",
            "rewards + beta * (logp_old"),
        "scale: not standardised": (
            'standardise(penalised, mask, "rms", eps)["y"]',
            "penalised"),
    },
    "standardise-rms": {
        "shift: the mean is removed": (
            'if how == "mean-std"',
            "if True"),
        "mask: padding": (
            "np.sqrt((real * real).mean())",
            "np.sqrt((x * x).mean())"),
        "sign": (
            "spread(mask, real / (np",
            "spread(mask, -real / (np"),
        "scale: variance": (
            "np.sqrt((real * real).mean())",
            "(real * real).mean()"),
    },
    "standardise-rms-one-token": {
        "shift: the mean is removed": (
            'if how == "mean-std"',
            "if True"),
        "mask: padding": (
            "np.sqrt((real * real).mean())",
            "np.sqrt((x * x).mean())"),
        "sign": (
            "spread(mask, real / (np",
            "spread(mask, -real / (np"),
        "scale: variance": (
            "np.sqrt((real * real).mean())",
            "(real * real).mean()"),
    },
    "standardise-mean-std": {
        "shift: the mean stays": (
            "real = real - real.mean()",
            "pass"),
        "mask: the mean of the padding": (
            "real = real - real.mean()",
            "real = real - x.mean()"),
        "sign": (
            "spread(mask, real / (np",
            "spread(mask, -real / (np"),
        "scale: the sample's variance": (
            "np.sqrt((real * real).mean())",
            "np.sqrt((real * real).sum() / (len(real) - 1))"),
    },
    "standardise-mean-std-one-token": {
        "shift: the mean stays": (
            "real = real - real.mean()",
            "pass"),
        "mask: the mean of the padding": (
            "real = real - real.mean()",
            "real = real - x.mean()"),
        "sign: the mean is added": (
            "real = real - real.mean()",
            "real = real + real.mean()"),
        "scale: the sample's variance": (
            "np.sqrt((real * real).mean())",
            "np.sqrt((real * real).sum() / (len(real) - 1))"),
    },
    "reward-to-go": {
        "shift: without its own reward": (
            "x[:, t] + (factor * y[:, t + 1]",
            "0 * x[:, t] + (factor * y[:, t + 1]"),
        "mask: padding": (
            "discounted(np.where(mask, rewards, 0), gamma)",
            "discounted(rewards, gamma)"),
        "sign": (
            "(factor * y[:, t + 1]",
            "(-factor * y[:, t + 1]"),
        "scale: gamma twice": (
            "(factor * y[:, t + 1]",
            "(factor ** 2 * y[:, t + 1]"),
    },
    "gae": {
        "shift: the value of the token itself": (
            "[V[:, 1:], np.zeros_like(V[:, :1])]",
            "[V[:, :-1], np.zeros_like(V[:, :1])]"),
        "mask: values in the padding": (
            "np.where(mask, values, 0)\n",
            "values\n"),
        "sign: the baseline is added": (
            "gamma * later - V",
            "gamma * later + V"),
        "scale: lambda without gamma": (
            "- V, gamma * lam)",
            "- V, lam)"),
    },
    "clipped-loss": {
        "shift: advantages": (
            "surrogate(logp[mask], logp_old[mask], advantages[mask], clip_eps)",
            "surrogate(logp[mask], logp_old[mask], np.roll(advantages[mask], 1), clip_eps)"),
        "mask: clipped tokens keep a slope": (
            "np.where(free > bound, 0, -free",
            "np.where(free > bound, -free, -free"),
        "mask: padding counts": (
            "free / len(logp))",
            "free / 16)"),
        "sign: max for min": (
            "-np.minimum(free, bound)",
            "-np.maximum(free, bound)"),
        "sign: k1": (
            '"kl_k1": (logp_old - logp)',
            '"kl_k1": (logp - logp_old)'),
        "scale: clip": (
            "np.clip(ratio, 1 - clip_eps, 1 + clip_eps)",
            "np.clip(ratio, 1 - clip_eps, 1 + 2 * clip_eps)"),
    },
    "linear-ppo": {
        "shift: targets": (
            "logp = chosen(logps, targets)\n    out, slope = surrogate(logp, logp_old, adv",
            "logp = chosen(logps, targets - 1)\n    out, slope = surrogate(logp, logp_old, adv"),
        "mask: the target's own slope": (
            "dz[np.arange(len(targets)), targets] += g",
            "pass"),
        "sign: gradient": (
            "logp_backward(slope, logps, targets, hidden",
            "logp_backward(-slope, logps, targets, hidden"),
        "scale: gradient without temperature": (
            "dz /= temperature",
            "pass"),
        "scale: entropy in bits": (
            ".sum(-1).mean()} \\",
            ".sum(-1).mean() / np.log(2)} \\"),
    },
    "value-loss": {
        "shift: the change is not clipped": (
            "moved = old + np.clip(V - old, -clip_eps, clip_eps)",
            "moved = V"),
        "mask: clipped values keep a slope": (
            "np.where(inside, moved - G, 0)",
            "moved - G"),
        "sign: min for max": (
            "np.maximum(free, bound).mean()",
            "np.minimum(free, bound).mean()"),
        "scale: no half": (
            "np.maximum(free, bound).mean() / 2",
            "np.maximum(free, bound).mean()"),
    },
    "clip-gradients": {
        "shift: a row early": (
            "clip_factor(norm, max_norm)[:, None]",
            "clip_factor(norm[::-1], max_norm)[:, None]"),
        "mask: small gradients grow to the limit": (
            "np.minimum(1, max_norm / (norm + 1e-6))",
            "max_norm / (norm + 1e-6)"),
        "sign: of the gradients": (
            '"clipped": g * clip_factor',
            '"clipped": -g * clip_factor'),
        "scale: the square of the norm": (
            "norm = np.sqrt((g * g).sum(-1))",
            "norm = (g * g).sum(-1)"),
    },
    "adamw": {
        "shift: eps inside the root": (
            "(np.sqrt(v / (1 - beta2 ** step)) + eps)",
            "np.sqrt(v / (1 - beta2 ** step) + eps)"),
        "shift: eps before the correction": (
            "(np.sqrt(v / (1 - beta2 ** step)) + eps)",
            "((np.sqrt(v) + eps) / np.sqrt(1 - beta2 ** step))"),
        "shift: steps count from 0": (
            "size = m / (1 - beta1 ** step)",
            "size = m / (1 - beta1 ** (step - 1))"),
        "mask: no decay": (
            "x * (1 - lr * weight_decay)",
            "x"),
        "sign: ascent": (
            "- lr * size",
            "+ lr * size"),
        "scale: decay without the rate": (
            "x * (1 - lr * weight_decay)",
            "x * (1 - weight_decay)"),
    },
    "muon": {
        "shift: the old momentum": (
            "X = momentum * m + (1 - momentum) * g",
            "X = momentum * matrices[f'm_{name}'] + (1 - momentum) * g"),
        "shift: one step fewer": (
            "for _ in range(steps):",
            "for _ in range(steps - 1):"),
        "mask: without Nesterov's look ahead": (
            "X = momentum * m + (1 - momentum) * g",
            "X = m"),
        "sign: ascent": (
            "x - lr * 0.2",
            "x + lr * 0.2"),
        "scale: the number of rows": (
            "max(x.shape) ** 0.5",
            "x.shape[0] ** 0.5"),
        "scale: the largest entry for the norm": (
            "X / np.sqrt((X * X).sum())",
            "X / np.abs(X).max()"),
    },
    "ppo-step": {
        "shift: gradient at the token itself": (
            "np.add.at(dhidden, (row, at - 1)",
            "np.add.at(dhidden, (row, at)"),
        "mask: key heads get the gradient of one query head only": (
            "summed = lambda g: g.reshape(B, T, n_kv_heads, shared, K).sum(3)",
            "summed = lambda g: g.reshape(B, T, n_kv_heads, shared, K)[..., 0, :]"),
        "mask: the softmax gradient without its mean": (
            "(dp - (dp * p).sum(-1, keepdims=True))",
            "dp"),
        "sign: turned forwards in the backward pass": (
            "scores, k), cos, -sin)",
            "scores, k), cos, sin)"),
        "sign: norm": (
            "(g - x * s * s * (g",
            "(g + x * s * s * (g"),
        "scale: silu": (
            "share * (1 + a * (1 - share))",
            "share"),
        "scale: not clipped": (
            "factor = clip_factor(norm, max_norm)",
            "factor = 1.0"),
        "scale: KL is left out": (
            "logp_ref, mask, beta, standardise_eps)",
            "logp_ref, mask, 0.0, standardise_eps)"),
    },
}
