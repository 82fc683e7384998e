"""Two token rewards for comparison, neither of them the paper's.

    likelihood     r_t = logp_t of the untrained model          control: is learning needed at all?
    logp           r_t = v . h_t + b + a logp_t                 ablation: does the feature help?

logp_t is the log-probability of token t by the model's own trunk and output matrix.
"""

import torch
from torch import Tensor, nn

from fgrlhf.model import LLaMA
from fgrlhf.reward import RewardModel
from fgrlhf.sequences import Located, Sequences, hidden_of, locate, unflatten
from kernels import linear_logp


class LogpReward(RewardModel):
    """The ablation: the log-probability of the token is a feature of the head, with weight a."""

    control = "logp"

    def __init__(self, trunk: LLaMA, response: str = "sum"):
        super().__init__(trunk, "token", response)
        self.logp_weight = nn.Parameter(torch.zeros((), device=self.device))

    def values(self, hidden: Tensor, logp: Tensor, at: Located) -> Tensor:
        """r_t [N] from the hidden states [B, S, D] and the log-probabilities [N]."""
        return self.head_value(hidden[at.row, at.position]) + self.logp_weight * logp

    def token_rewards(self, sequences: Sequences) -> Tensor:
        at = locate(sequences)
        hidden = hidden_of(self.trunk, sequences)
        before = hidden[at.row, at.position - 1]                                 # [N, D]
        logp = linear_logp.fused(before, self.trunk.head, at.target).logp        # [N]
        return unflatten(self.values(hidden, logp, at), at, sequences)


class LikelihoodReward(LogpReward):
    """The control: nothing is learnt, and the reward of a token is its log-probability."""

    control = "likelihood"

    def values(self, hidden: Tensor, logp: Tensor, at: Located) -> Tensor:
        return logp


CONTROLS = {kind.control: kind for kind in (LikelihoodReward, LogpReward)}
