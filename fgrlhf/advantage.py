"""From token rewards to advantages: equations (5) and (6) (paper, section 2.2).

    (5)  r~_t = r_t - beta (logp_old_t - logp_ref_t)       the token's reward less its KL
    (6)  A_t  = standardised r~_t                          no critic, no GAE

All tensors are response-aligned, [B, T], with `mask` True on real tokens. Padding comes out as 0
and changes nothing. What PPO-RLHF computes in place of (6) is in baseline.py.
"""

import torch
from torch import Tensor

from fgrlhf.sequences import Sequences, locate


def penalise_kl(rewards: Tensor, logp_old: Tensor, logp_ref: Tensor, mask: Tensor,
                beta: float) -> Tensor:
    """Returns (5), r_t - beta (logp_old_t - logp_ref_t), in units of reward.

    rewards, logp_old, logp_ref [B, T] (nats), mask [B, T] bool -> [B, T]. beta is the price of one
    nat of KL. Raises ValueError when the shapes differ.
    """
    if not rewards.shape == logp_old.shape == logp_ref.shape == mask.shape:
        raise ValueError(f"rewards, logp_old, logp_ref: expected (B, T) = {tuple(mask.shape)}, "
                         f"got {tuple(rewards.shape)}, {tuple(logp_old.shape)}, "
                         f"{tuple(logp_ref.shape)}; pass the response part only")
    return torch.where(mask, rewards - beta * (logp_old - logp_ref), 0.0)


def reward_to_go(penalised: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Returns G_t = r~_t + gamma G_{t+1} over the response, [B, T] -> [B, T].

    The paper's reading is gamma = 0: the return of a token is r~_t, the token's own reward.
    """
    returns = torch.where(mask, penalised, 0.0)
    for t in reversed(range(penalised.shape[1] - 1)):
        returns[:, t] += gamma * returns[:, t + 1]
    return returns


def standardise(x: Tensor, mask: Tensor, how: str, eps: float = 1e-6) -> Tensor:
    """Returns (6): the only standardisation of advantages, over all real tokens of the batch.

        rms       x / (rms + eps)              keeps the sign of r~_t; the default of train_ppo.py
        mean-std  (x - mean) / (std + eps)     population std, so that one token gives 0, not NaN
        none      x

    x, mask [B, T] -> [B, T]. An empty mask gives zeros. Raises ValueError for any other `how`.
    """
    if how not in ("mean-std", "rms", "none"):
        raise ValueError(f"how: expected mean-std, rms or none, got {how!r}")
    x = torch.where(mask, x, 0.0)
    count = mask.sum().clamp(min=1)
    if how == "mean-std":
        x = torch.where(mask, x - x.sum() / count, 0.0)
    return x if how == "none" else x / ((x.square().sum() / count).sqrt() + eps)


# ----- options of the reward: not in the paper ----------------------------------------------------

def without_eos(rewards: Tensor, sequences: Sequences, eos_id: int) -> Tensor:
    """Returns r_t with 0 at EOS, [B, T] -> [B, T].

    Calibrated rewards have the mean 0 over the rejected responses of the reward model's training,
    so EOS gets their average, whatever it follows. (With the loss tlcr, 0 means neither right nor
    wrong.) Where edits are shorter than their originals, a
    reward model learns a high reward for every EOS, behind good and bad responses alike, and a
    policy gets it most often by short responses. When the rewards of the other tokens have risen
    above 0, an EOS of 0 is below their average.
    """
    at = locate(sequences)
    ends = at.target == eos_id
    return rewards.index_put((at.row[ends], at.t[ends]), rewards.new_zeros(()))


def penalise_missing_eos(rewards: Tensor, sequences: Sequences, truncated: Tensor,
                         penalty: float) -> Tensor:
    """Subtracts `penalty` at the last token of each truncated response, [B, T] -> [B, T].

    truncated [B] bool: the response has no EOS. A sequence-level reward model has learnt from the
    last tokens of finished responses only; what it says in the middle of a sentence is no judgement
    of the response, and may be high.
    """
    row = truncated.nonzero()[:, 0]
    last = sequences.response_lengths[row] - 1
    return rewards.index_put((row, last), rewards[row, last] - penalty)
