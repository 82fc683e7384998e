"""RLOO and GRPO: the other responses to the same prompt take the place of the critic.

K responses are sampled to each prompt. With R~_i = sum_t r~_t, the reward of response i less its KL
(equation (5) summed over the response), every token of response i gets one advantage:

    RLOO    A_i = R~_i - mean of R~_j over the K - 1 other responses
    GRPO    A_i = (R~_i - mean of R~_j over all K) / (their standard deviation + 1e-6)

RLOO: Ahmadian et al. 2024 (arXiv 2402.14740). GRPO: Shao et al. 2024 (arXiv 2402.03300), which adds
the KL to the loss; here it is a part of the reward, as in the other methods of train_ppo.py.
"""

import torch
from torch import Tensor

METHODS = ("rloo", "grpo")


def group_advantage(penalised: Tensor, mask: Tensor, group: int, method: str) -> Tensor:
    """Gives every token of a response the advantage of the response: [B, T] -> [B, T].

    penalised: r~_t, 0 in the padding. group: K >= 2; rows i K to i K + K - 1 answer one prompt.
    Raises ValueError when the rows are not whole groups, or for another method.
    """
    if method not in METHODS or group < 2 or len(penalised) % group:
        raise ValueError(f"method, group: expected one of {', '.join(METHODS)} and a divisor of "
                         f"the {len(penalised)} rows that is at least 2, got {method!r}, {group}")
    totals = torch.where(mask, penalised, 0.0).sum(-1).view(-1, group)              # [P, K]
    above = totals - totals.mean(-1, keepdim=True)
    if method == "rloo":
        advantages = above * (group / (group - 1))              # the same as leaving i out
    else:
        advantages = above / (totals.std(-1, correction=0, keepdim=True) + 1e-6)
    return torch.where(mask, advantages.view(-1, 1), 0.0)
