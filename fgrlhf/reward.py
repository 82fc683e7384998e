"""Reward models (paper, section 2.2): token-level, and the sequence-level one of PPO-RLHF.

    token      r_t = v . h_t + b                      read at the position of token t itself
               R(x, y) = 1/T sum_t r_t                equation (1), or without the 1/T
    sequence   R(x, y) = v . h_T + b                  read at the last token (EOS when y ended)
    (2)        P(y+ > y-) = sigmoid(R(x, y+) - R(x, y-))

h_t is the last hidden state, or with --layer N the hidden state h_t^(N) behind the first N blocks.

The paper's loss is -log of (2), with the mean in (1). Our loss has the sum in (1) and puts only the
changed tokens into the margin. For an edit y+ of y-,

    (3)        s = sum_U1+ r_t - sum_U1- r_t
               sum_t r_t+ - sum_t r_t- = s + sum_U0 (r_j+ - r_i-) + rest

The core assumption: the unchanged tokens U0 are worth the same on both sides, so their sum is 0 and
(2) becomes sigmoid(s). (The rest are the partners of tokens that only the gap rule credits; without
--credit-gap there are none.) Our equation (4) is -log sigmoid(s), a term that pulls the rewards of
U0 to 0, and a term for each changed token. `token_loss` computes the paper's loss or ours,
`sequence_loss` is (2) for the sequence model. Both kinds of model start from the SFT model, with a
head at Normal(0, 1/sqrt(D+1)) (Stiennon et al. 2020).

PPO gets calibrated rewards, (r - mean) / scale, so that the KL coefficient beta means the same for
every reward model. `calibrate` measures mean and scale once: train_rm.py calls it on rejected
responses of the training records.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fgrlhf.checkpoint import load_adapted, load_model, save_model
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_object, write_atomic
from fgrlhf.data.records import Edit, Pair
from fgrlhf.encode import PreferenceIds, span_types
from fgrlhf.engine import lora
from fgrlhf.engine.encoding import Encoding
from fgrlhf.engine.places import refuse_run_folder
from fgrlhf.evaluate import Judged
from fgrlhf.layouts.pickles import open_pickle
from fgrlhf.layouts.stored import check_finite
from fgrlhf.model import LLaMA
from fgrlhf.sequences import (
    Located, Sequences, hidden_at, locate, locate_last, pack, unflatten)
from fgrlhf.tokenizer import Tokenizer
from kernels import token_preference
from kernels.token_preference import Lengths, Options, Preference, Totals, Unchanged

KINDS = ("token", "sequence")
RESPONSES = ("sum", "mean")
DESCRIPTION = ("kind", "control", "response", "confidence", "layer")    # a model's reward.json


class RewardModel(nn.Module):
    """A LLaMA trunk with one linear head. `kind` says what the output of the head means.

    layer: N in r_t = v . h_t^(N) + b, from 1. The head reads the hidden state behind the first N
    blocks, and the others are not computed. None: behind all blocks and the last norm.

    response: "mean" or "sum", how R comes from the rewards of tokens, equation (1). `mean` and
    `scale` are those of `calibrate`: of r_t over tokens (kind "token"), or of R over
    responses (kind "sequence"). confidence: PPO gets 2 sigmoid(r_t) - 1 in [-1, 1] in place of r_t,
    divided by its scale only, because 0 means "neither right nor wrong" (TLCR's form).
    """

    control: str | None = None          # the name of a model of controls.py

    def __init__(self, trunk: LLaMA, kind: str, response: str = "sum", confidence: bool = False,
                 layer: int | None = None):
        super().__init__()
        if kind not in KINDS or response not in RESPONSES:
            raise ValueError(f"kind, response: expected one of {', '.join(KINDS)} and one of "
                             f"{', '.join(RESPONSES)}, got {kind!r} and {response!r}")
        if layer is not None and not 1 <= layer <= trunk.config.n_layers:
            raise ValueError(f"layer: expected 1 to {trunk.config.n_layers}, the blocks of the "
                             f"model, got {layer}")
        self.trunk, self.kind, self.response = trunk, kind, response
        self.confidence, self.layer = confidence, layer
        self.frozen: Callable[[Sequences, Located], Tensor] | None = None       # see frozen.py
        D, device = trunk.config.dim, trunk.head.device
        wide = torch.promote_types(trunk.head.dtype, torch.float32)
        self.head = nn.Linear(D, 1, device=device, dtype=wide)
        nn.init.normal_(self.head.weight, 0.0, (D + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros((), device=device))
        self.register_buffer("scale", torch.ones((), device=device))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def hidden(self, sequences: Sequences, at: Located) -> Tensor:
        """Returns h_t^(N) [N, D] of the located tokens."""
        if self.frozen is not None:
            return self.frozen(sequences, at)
        return hidden_at(self.trunk, sequences, at, self.layer)

    def head_value(self, hidden: Tensor) -> Tensor:
        """Returns v . h + b, [N, D] -> [N] in the dtype of the head, float32 or wider."""
        return self.head(hidden.to(self.head.weight.dtype))[:, 0]

    def token_rewards(self, sequences: Sequences) -> Tensor:
        """Returns r_t [B, T] of a token model on its own scale, 0 in the padding."""
        if self.kind != "token":
            raise ValueError("token_rewards: expected a token-level reward model, "
                             "got a sequence-level one")
        at = locate(sequences)
        return unflatten(self.head_value(self.hidden(sequences, at)), at, sequences)

    def sequence_rewards(self, sequences: Sequences) -> Tensor:
        """Returns R(x, y) [B] on its own scale: (1), or the head's value at the last token."""
        if self.kind == "token":
            return response_rewards(self.token_rewards(sequences), sequences.response_lengths,
                                    self.response)
        return self.head_value(self.hidden(sequences, locate_last(sequences)))

    def ppo_rewards(self, sequences: Sequences) -> Tensor:
        """Returns calibrated rewards [B, T]: one per token, or all of R on the last token."""
        mask = sequences.response_mask
        if self.kind == "token":
            rewards = self._for_ppo(self.token_rewards(sequences))
            return torch.where(mask, (rewards - self.mean) / self.scale, 0.0)
        steps = torch.arange(mask.shape[1], device=mask.device)
        last = steps == sequences.response_lengths[:, None] - 1                  # [B, T]
        calibrated = (self.sequence_rewards(sequences) - self.mean) / self.scale
        return torch.where(last, calibrated[:, None], 0.0)

    def _for_ppo(self, rewards: Tensor) -> Tensor:
        """r_t, or 2 sigmoid(r_t) - 1 with `confidence`."""
        return 2 * rewards.sigmoid() - 1 if self.confidence else rewards

    @torch.no_grad()
    def calibrate(self, samples: list[Sequences]) -> None:
        """Sets mean and scale: the mean and standard deviation of r_t or R over `samples`."""
        if self.kind == "token":
            values = self._for_ppo(torch.cat([self.token_rewards(s)[s.response_mask]
                                              for s in samples]))
        else:
            values = torch.cat([self.sequence_rewards(s) for s in samples])
        self.mean.copy_(values.mean() * (not self.confidence))          # 0 with `confidence`
        self.scale.copy_(values.std(correction=0).clamp(min=1e-6))


def response_rewards(token_rewards: Tensor, lengths: Tensor, response: str) -> Tensor:
    """R [B] of equation (1): the mean or the sum of r_t [B, T], which is 0 in the padding.

    lengths [B]: of the responses. response: "mean" or "sum".
    """
    sums = token_rewards.sum(-1)
    return sums / lengths if response == "mean" else sums


# ----- losses -------------------------------------------------------------------------------------

class PreferenceBatch(NamedTuple):
    """A minibatch of B preferences, both sides packed together. T is the longest response."""

    sequences: Sequences        # 2B rows: the B chosen sides, then the B rejected ones
    plus: Tensor                # [B, T] bool, True on U1+, tokens of the chosen side
    minus: Tensor               # [B, T] bool, True on U1-, tokens of the rejected side
    unchanged: Unchanged        # U0: M pairings of a chosen token with a rejected one

    @staticmethod
    def of(pairs: list[PreferenceIds], device=None) -> "PreferenceBatch":
        both = pack([p.prompt for p in pairs] * 2,
                    [p.chosen for p in pairs] + [p.rejected for p in pairs], device=device)
        plus, minus = torch.zeros(2, len(pairs), both.response_mask.shape[1], dtype=torch.bool)
        for b, pair in enumerate(pairs):
            plus[b, pair.plus] = True
            minus[b, pair.minus] = True
        triples = [(b, i, j) for b, pair in enumerate(pairs) for i, j in pair.unchanged]
        unchanged = torch.tensor(triples, dtype=torch.long, device=device).reshape(-1, 3)
        return PreferenceBatch(both, plus.to(device), minus.to(device), Unchanged(*unchanged.T))

    def totals(self) -> Totals:
        """The numbers that equation (4) divides by; a microbatch uses those of its minibatch."""
        return token_preference.totals_of(self.plus, self.minus, self.unchanged)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        named = {f"unchanged_{name}": x for name, x in self.unchanged._asdict().items()}
        return self.sequences._asdict() | {"plus": self.plus, "minus": self.minus} | named

    def rows(self, index: Tensor) -> "PreferenceBatch":
        """The selected preferences, `index` [b], with the padding cut to the longest of them."""
        B = len(self.plus)
        index = index.to(self.plus.device)
        sequences = self.sequences.rows(torch.cat([index, B + index]))
        T = int(sequences.response_lengths.max())
        # U0 names its pair by the row in the batch: give each the row in the selection.
        place = torch.full((B,), -1, device=index.device)
        place[index] = torch.arange(len(index), device=index.device)
        kept = place[self.unchanged.pair] >= 0
        pair, chosen, rejected = (part[kept] for part in self.unchanged)
        return PreferenceBatch(sequences, self.plus[index, :T], self.minus[index, :T],
                               Unchanged(place[pair], chosen, rejected))


def token_loss(model: RewardModel, batch: PreferenceBatch, options: Options,
               totals: Totals | None = None) -> Preference:
    """Equations (3) and (4) on a batch of edits; kernels/token_preference.py has the formulas.

    totals: those of the whole minibatch when `batch` is a part of it.
    """
    chosen, rejected = model.token_rewards(batch.sequences).chunk(2)             # [B, T] each
    lengths = Lengths(*batch.sequences.response_lengths.chunk(2))
    return token_preference.fused(chosen, rejected, batch.plus, batch.minus, batch.unchanged,
                                  lengths, options, totals)


def sequence_loss(model: RewardModel, batch: PreferenceBatch,
                  pairs: int | None = None) -> tuple[Tensor, Tensor]:
    """Equation (2), Bradley-Terry: returns (-mean log sigmoid(R(y+) - R(y-)), the margins [B]).

    pairs: the number in the whole minibatch when `batch` is a part of it.
    """
    chosen, rejected = model.sequence_rewards(batch.sequences).chunk(2)          # [B] each
    margins = chosen - rejected
    return -F.logsigmoid(margins).sum() / (pairs or len(margins)), margins.detach()


# ----- evaluation ---------------------------------------------------------------------------------

@torch.no_grad()
def judge_preferences(model: RewardModel, records: list[Edit | Pair],
                      examples: list[PreferenceIds], tokenizer: Tokenizer) -> list[Judged]:
    """Rewards both sides of held-out preferences. Marks error spans, and what an editor took out.

    `examples` are the encoded `records`, in the same order.
    """
    judged = []
    for record, pair in zip(tqdm(records, desc="evaluate", leave=False), examples):
        both = pack([pair.prompt] * 2, [pair.chosen, pair.rejected], device=model.device)
        if model.kind == "token":
            judged.append(judge_tokens(record, pair, model.token_rewards(both), model.response,
                                       tokenizer))
        else:
            judged.append(Judged(record.id, *model.sequence_rewards(both).tolist(), pair.change,
                                 lengths=(len(pair.chosen), len(pair.rejected)), response="last"))
    return judged


def judge_tokens(record: Edit | Pair, pair: PreferenceIds, token_rewards: Tensor, response: str,
                 tokenizer: Tokenizer) -> Judged:
    """Judges one preference by the rewards of its tokens.

    token_rewards [2, T]: of the chosen side, then of the rejected side, 0 in the padding. response:
    R is their "sum" or their "mean", equation (1).
    """
    lengths = (len(pair.chosen), len(pair.rejected))
    R = response_rewards(token_rewards, torch.tensor(lengths, device=token_rewards.device),
                         response)
    rewards, types, drift, removed = [], [], [], []
    if isinstance(record, Edit):
        n = lengths[1] - (pair.rejected[-1] == tokenizer.eos_id)                # without EOS
        rewards, removed = token_rewards[1, :n].tolist(), [t in pair.removed for t in range(n)]
        drift = [(token_rewards[0, j] - token_rewards[1, i]).item() for j, i in pair.unchanged]
        if record.spans is not None:
            types = span_types(tokenizer, record.original, record.spans)[:n]
    return Judged(record.id, *R.tolist(), pair.change, rewards, types, lengths, drift, response,
                  removed)


# ----- folders ------------------------------------------------------------------------------------

def save_reward(model: RewardModel, path: str | Path, tokenizer: Tokenizer,
                encoding: Encoding | None = None) -> None:
    """Writes a model folder with `reward_head.pt` and, last, `reward.json`.

    A critic (baseline.py), which has the same parts, is written as a token-level model.
    encoding: how the records of the training became ids, for `check_encoding`.
    """
    folder = Path(path)
    save_model(model.trunk, folder, tokenizer=tokenizer, encoding=encoding)
    own = {name: value.detach() for name, value in [*model.named_parameters(),
                                                    *model.named_buffers()]
           if not name.startswith("trunk.")}
    write_atomic(folder / "reward_head.pt", lambda file: torch.save(own, file))
    description = {name: getattr(model, name) for name in DESCRIPTION}
    write_atomic(folder / "reward.json", (json.dumps(description) + "\n").encode())


def load_reward(path: str | Path, device="cpu", dtype=None,
                trunks: dict[Path, LLaMA] | None = None) -> RewardModel:
    """Reads the reward model in a folder that `save_reward` wrote.

    With `trunks`, adapters stay apart from their trunk, which is shared (`load_adapted`). Raises
    UserError when the folder is damaged or holds a plain model.
    """
    description = describe_reward(path)
    if trunks is not None and lora.is_folder(path):
        trunk = load_adapted(path, device, dtype, trunks=trunks, reward=True)
    else:
        trunk = load_model(path, device, dtype, reward=True)
    file = Path(path) / "reward_head.pt"
    own = open_pickle(file)
    for name, tensor in own.items():
        check_finite(tensor, f"{file}: tensor {name}")
    try:
        model = _build(trunk, **description)
        missing, unknown = model.load_state_dict(own, strict=False)
    except Exception as error:                      # a flipped bit in a pickle can raise anything
        raise UserError(f"{file}: damaged ({type(error).__name__}); "
                        "copy the folder again") from None
    if unknown or any(not key.startswith("trunk.") for key in missing):
        raise UserError(f"{file}: does not fit reward.json; copy the folder again")
    return model


def describe_reward(path: str | Path) -> dict[str, str | bool | int | None]:
    """Reads the DESCRIPTION of a reward model: what its constructor needs besides the trunk.

    Raises UserError when the folder holds no reward model, or `reward.json` is damaged.
    """
    refuse_run_folder(path)
    file = Path(path) / "reward.json"
    if not file.is_file():
        raise UserError(f"{path}: expected a reward model folder (with reward.json), "
                        "as train_rm.py writes")
    found = read_object(file, "copy the folder again")
    about = {name: found.get(name) for name in DESCRIPTION}
    about["response"] = about["response"] or "sum"              # an older folder
    about["confidence"] = about["confidence"] or False
    if (about["kind"] not in KINDS or about["control"] not in (None, "logp", "likelihood")
            or about["response"] not in RESPONSES or about["confidence"] not in (True, False)
            or not isinstance(about["layer"], int | None) or about["layer"] is True):
        raise UserError(f"{file}: damaged; copy the folder again")
    return about


def _build(trunk: LLaMA, kind: str, control: str | None, response: str, confidence: bool,
           layer: int | None) -> RewardModel:
    if control is None:
        return RewardModel(trunk, kind, response, confidence, layer)
    from fgrlhf.controls import CONTROLS
    return CONTROLS[control](trunk, response)
