"""Log-probabilities from hidden states, cross-entropy, sampling, and KL (paper, section 2.2)."""

import torch
from torch import Tensor

from fgrlhf.golden.case import GARBAGE, Case, Draw, gradients, leaves, number
from fgrlhf.golden.transformer import log_softmax

N, D, V = 5, 6, 11


def heads(name: str) -> tuple[Tensor, Tensor, Tensor, Draw]:
    """hidden [N, D], head [V, D], targets [N], and the source of further numbers."""
    draw = Draw(name)
    return draw.numbers(N, D, scale=2.0), draw.numbers(V, D, scale=2.0), \
        torch.tensor(draw.ids(N, 0, V)), draw


def linear_logp() -> Case:
    hidden, head, targets, draw = heads("linear-logp")
    weights, temperature = draw.numbers(N), 1.25
    h, w = leaves(hidden, head)
    rows = [h[i] @ w.T / temperature for i in range(N)]
    logp = torch.stack([log_softmax(z)[y] for z, y in zip(rows, targets)])
    normaliser = torch.stack([(z - log_softmax(z))[0] for z in rows])
    entropy = torch.stack([-(log_softmax(z).exp() * log_softmax(z)).sum() for z in rows])
    return Case("linear-logp", "2.2", "log pi",
                "z_ij = hidden_i . head_j / temperature. logp [N]: logp_i = z_i,target - logsumexp "
                "z_i. logsumexp [N]. entropy [N] in nats. grad_hidden and grad_head are gradients "
                "of sum_i weights_i logp_i.", {"temperature": temperature},
                {"hidden": hidden, "head": head, "targets": targets, "weights": weights},
                {"logp": logp, "logsumexp": normaliser, "entropy": entropy}
                | gradients((weights * logp).sum(), hidden=h, head=w))


def cross_entropy() -> Case:
    hidden, head, targets, draw = heads("cross-entropy")
    mask = torch.tensor([True, True, False, True, False])
    hidden[~mask] = GARBAGE
    h, w = leaves(hidden, head)
    logp = [log_softmax(h[i] @ w.T)[targets[i]] for i in range(N) if mask[i]]
    loss = -sum(logp) / len(logp)
    return Case("cross-entropy", "3.1", "cross-entropy",
                "The loss of SFT: loss = -mean of log softmax(hidden head^T)[target] over the "
                "tokens of mask, with its gradients.", {},
                {"hidden": hidden, "head": head, "targets": targets, "mask": mask},
                {"loss": loss} | gradients(loss, hidden=h, head=w))


def sampling() -> Case:
    """Each uniform number is in the middle of its token's interval, so rounding does not matter."""
    draw = Draw("inverse-cdf")
    logits, wanted = draw.numbers(6, V, scale=2.0), [0, 3, 10, 7, 1, 10]
    uniform = []
    for row, token in zip(logits, wanted):
        p = log_softmax(row).exp()
        middle = p[:token].sum() + p[token] / 2
        uniform.append(round(float(middle) * 1024) / 1024)
    tokens = []
    for row, u in zip(logits, uniform):
        total, token = 0.0, -1
        while total <= u:
            token += 1
            total += float(log_softmax(row).exp()[token])
        tokens.append(token)
    assert tokens == wanted
    return Case("inverse-cdf", "2.2", "pi_old",
                "Sampling. token [N]: the first token whose cumulative probability under "
                "softmax(logits) exceeds uniform. Add up in float64; if rounding leaves no such "
                "token, take the last one.", {},
                {"logits": logits, "uniform": number(uniform)},
                {"token": torch.tensor(tokens)})


def kl_estimates() -> Case:
    draw, mask = Draw("kl-estimates"), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    logp, logp_ref = draw.numbers(2, 4) - 2, draw.numbers(2, 4) - 2
    logp[~mask], logp_ref[~mask] = GARBAGE, -GARBAGE
    ratios = [torch.exp(q - p) for p, q in zip(logp[mask], logp_ref[mask])]
    k1 = sum(-torch.log(r) for r in ratios) / len(ratios)
    k3 = sum(r - 1 - torch.log(r) for r in ratios) / len(ratios)
    return Case("kl-estimates", "2.2", "k1, k3",
                "Two estimates of KL(pi || ref) from samples of pi. With r = exp(logp_ref - logp), "
                "kl_k1 = mean(-log r) and kl_k3 = mean(r - 1 - log r) over the tokens of mask.", {},
                {"logp": logp, "logp_ref": logp_ref, "mask": mask},
                {"kl_k1": number(k1), "kl_k3": number(k3)})


def exact_kl() -> Case:
    hidden, head, _, draw = heads("exact-kl")
    hidden_ref, head_ref = draw.numbers(N, 4, scale=2.0), draw.numbers(V, 4, scale=2.0)
    weights, temperature = draw.numbers(N), 1.25
    h, w = leaves(hidden, head)
    kl = []
    for i in range(N):
        p = log_softmax(h[i] @ w.T / temperature)
        q = log_softmax(hidden_ref[i] @ head_ref.T / temperature)
        kl.append(sum(p[j].exp() * (p[j] - q[j]) for j in range(V)))
    kl = torch.stack(kl)
    return Case("exact-kl", "2.2", "KL",
                "kl [N] = sum_j p_j (log p_j - log q_j), p = softmax(hidden head^T / temperature), "
                "q = softmax(hidden_ref head_ref^T / temperature). The reference has another "
                "width. grad_hidden and grad_head are gradients of sum_i weights_i kl_i.",
                {"temperature": temperature},
                {"hidden": hidden, "head": head, "hidden_ref": hidden_ref, "head_ref": head_ref,
                 "weights": weights},
                {"kl": kl} | gradients((weights * kl).sum(), hidden=h, head=w))


def cases() -> list[Case]:
    return [linear_logp(), cross_entropy(), sampling(), kl_estimates(), exact_kl()]
