"""Reward models: the paper's token-level one (section 3.2) and the baseline's sequence-level one.

    token      r_t = v . h_t + b [+ a logp_t]              read at token t itself
               R(x, y) = sum_t r_t                         equation (1)
    sequence   R(x, y) = v . h_T + b [+ a sum_t logp_t]    read at the last token, EOS when it ended

The token model is trained from edits by equation (4), the sequence model from pairs by
Bradley-Terry (2). Both start from the SFT model; the head starts at Normal(0, 1/sqrt(D+1))
(Stiennon et al. 2020). The log-probability feature `a` is not in the paper and off by default;
logp_t comes from the reward model's own trunk and output matrix. A model with v = 0, b = 0, a = 1
is the log-likelihood control.

For PPO the rewards are put on one scale, (r - mean) / scale, so that the KL coefficient beta means
the same for every model; mean and scale are measured once (`calibrate`), by train_rm.py on the
rejected responses of its training records.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgrlhf.checkpoint import load_adapted, load_model, save_model
from fgrlhf import lora
from fgrlhf.config import UserError
from fgrlhf.encode import PreferenceIds
from fgrlhf.files import read_bytes, write_atomic
from fgrlhf.model import LLaMA
from fgrlhf.rollout import Sequences, locate, pack, unflatten
from fgrlhf.tokenizer import Tokenizer
from kernels import linear_logp, token_preference

KINDS = ("token", "sequence")


class RewardModel(nn.Module):
    """A LLaMA trunk with one linear head. `kind` says what the head's output means.

    mean and scale are those of `calibrate`: of r_t over tokens (kind token) or of R over responses.
    """

    def __init__(self, trunk: LLaMA, kind: str, logp_feature: bool = False):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        self.trunk, self.kind, self.logp_feature = trunk, kind, logp_feature
        D = trunk.config.dim
        wide = torch.promote_types(trunk.head.dtype, torch.float32)     # one number a token: cheap
        self.head = nn.Linear(D, 1, device=trunk.head.device, dtype=wide)
        nn.init.normal_(self.head.weight, 0.0, (D + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        self.logp_weight = nn.Parameter(torch.zeros((), device=trunk.head.device),
                                        requires_grad=logp_feature)
        self.register_buffer("mean", torch.zeros((), device=trunk.head.device))
        self.register_buffer("scale", torch.ones((), device=trunk.head.device))

    def _read(self, hidden: Tensor) -> Tensor:
        """v . h + b, [N, D] -> [N] float32."""
        return self.head(hidden.to(self.head.weight.dtype))[:, 0].float()

    def _token_values(self, sequences: Sequences) -> Tensor:
        """v . h_t + b + a logp_t at each response token, [B, T] float32, 0 in the padding."""
        at = locate(sequences)
        hidden = self.trunk.hidden(sequences.tokens, lengths=sequences.lengths)
        values = self._read(hidden[at.row, at.position])                         # [N]
        if self.logp_feature:
            before = hidden[at.row, at.position - 1]                             # [N, D]
            logp = linear_logp.fused(before, self.trunk.head, at.target).logp
            values = values + self.logp_weight * logp
        return unflatten(values, at, sequences)

    def token_rewards(self, sequences: Sequences) -> Tensor:
        """r_t [B, T] of a token model, on its own scale, 0 in the padding."""
        if self.kind != "token":
            raise ValueError("token_rewards: expected a token-level reward model, "
                             "got a sequence-level one")
        return self._token_values(sequences)

    def sequence_rewards(self, sequences: Sequences) -> Tensor:
        """R(x, y) [B], on its own scale: equation (1), or the head's value at the last token."""
        if self.kind == "token":
            return self._token_values(sequences).sum(-1)
        rows = torch.arange(len(sequences.tokens), device=sequences.tokens.device)
        last = sequences.lengths - 1
        hidden = self.trunk.hidden(sequences.tokens, lengths=sequences.lengths)
        values = self._read(hidden[rows, last])
        if self.logp_feature:
            at = locate(sequences)
            before = hidden[at.row, at.position - 1]                             # [N, D]
            logp = linear_logp.fused(before, self.trunk.head, at.target).logp
            values = values + self.logp_weight * unflatten(logp, at, sequences).sum(-1)
        return values

    def ppo_rewards(self, sequences: Sequences) -> Tensor:
        """Calibrated rewards for PPO, [B, T]: one a token, or all of R on the last token."""
        mask = sequences.response_mask
        if self.kind == "token":
            return torch.where(mask, (self.token_rewards(sequences) - self.mean) / self.scale, 0.0)
        steps = torch.arange(mask.shape[1], device=mask.device)
        last = steps == sequences.response_lengths[:, None] - 1                  # [B, T]
        normalised = (self.sequence_rewards(sequences) - self.mean) / self.scale
        return torch.where(last, normalised[:, None], 0.0)

    @torch.no_grad()
    def calibrate(self, samples: list[Sequences]) -> None:
        """Set mean and scale from batches of reference samples.

        sequence: mean and standard deviation of R. token: those of r_t over all tokens.
        """
        if self.kind == "token":
            values = torch.cat([self.token_rewards(s)[s.response_mask] for s in samples])
        else:
            values = torch.cat([self.sequence_rewards(s) for s in samples])
        self.mean.copy_(values.mean())
        self.scale.copy_(values.std(correction=0).clamp(min=1e-6))


def token_loss(model: RewardModel, batch: list[PreferenceIds],
               options: token_preference.Options,
               divisors: token_preference.Totals | None = None) -> token_preference.Preference:
    """Equation (4) on a batch of edits, by the kernel; see kernels/token_preference.py.

    divisors: those of the whole minibatch where `batch` is a part of it.
    """
    B, device = len(batch), model.head.weight.device
    both = pack([p.prompt for p in batch] * 2,
                [p.chosen for p in batch] + [p.rejected for p in batch], device=device)
    rewards = model.token_rewards(both)                                          # [2B, T]
    masks = torch.zeros_like(rewards, dtype=torch.bool)
    for b, pair in enumerate(batch):
        masks[b, pair.plus] = True
        masks[B + b, pair.minus] = True
    triples = [(b, i, j) for b, pair in enumerate(batch) for i, j in pair.unchanged]
    unchanged = torch.tensor(triples, dtype=torch.long, device=device).reshape(-1, 3)
    return token_preference.fused(rewards[:B], rewards[B:], masks[:B], masks[B:],
                                  token_preference.Unchanged(*unchanged.T), options, divisors)


def sequence_loss(model: RewardModel, batch: list[PreferenceIds],
                  pairs: float | None = None) -> tuple[Tensor, Tensor]:
    """Bradley-Terry, equation (2): (-mean log sigmoid(R(y+) - R(y-)), the margins [B]).

    pairs: those of the whole minibatch, which the mean is over, where `batch` is a part of it.
    """
    both = pack([p.prompt for p in batch] * 2,
                [p.chosen for p in batch] + [p.rejected for p in batch],
                device=model.head.weight.device)
    chosen, rejected = model.sequence_rewards(both).chunk(2)
    margins = chosen - rejected
    return -F.logsigmoid(margins).sum() / (pairs or len(batch)), margins.detach()


def save_reward(model: RewardModel, path: str | Path, tokenizer: Tokenizer) -> None:
    """A model folder with `reward_head.pt` and, written last, `reward.json` beside the trunk."""
    folder = Path(path)
    save_model(model.trunk, folder, tokenizer=tokenizer)
    own = {name: value for name, value in model.state_dict().items()
           if not name.startswith("trunk.")}
    write_atomic(folder / "reward_head.pt", lambda file: torch.save(own, file))
    description = {"kind": model.kind, "logp_feature": model.logp_feature}
    write_atomic(folder / "reward.json", (json.dumps(description) + "\n").encode())


def load_reward(path: str | Path, device="cpu", dtype=None,
                trunks: dict[Path, LLaMA] | None = None) -> RewardModel:
    """The reward model in a folder of `save_reward`; refused when damaged, or a plain model.

    With `trunks` adapters stay apart from their trunk, which is shared (`load_adapted`).
    """
    folder = Path(path)
    if not (folder / "reward.json").is_file():
        raise UserError(f"{folder}: expected a reward model folder (with reward.json), "
                        "as train_rm.py writes")
    if trunks is not None and lora.is_folder(folder):
        trunk = load_adapted(folder, device, dtype, trunks=trunks)
    else:
        trunk = load_model(folder, device, dtype)
    name = "reward.json"
    try:
        model = RewardModel(trunk, **json.loads(read_bytes(folder / name)))
        name = "reward_head.pt"
        own = torch.load(folder / name, map_location=device, weights_only=True)
        missing, unknown = model.load_state_dict(own, strict=False)
    except Exception as error:                      # a flipped bit in a pickle can raise anything
        raise UserError(f"{folder / name}: damaged ({type(error).__name__}); "
                        "copy the folder again") from None
    if unknown or any(not key.startswith("trunk.") for key in missing):
        raise UserError(f"{folder / name}: does not fit reward.json; copy the folder again")
    return model
