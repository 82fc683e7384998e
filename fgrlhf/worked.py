"""One record worked through the whole method by its numbers: equations (1) to (7).

    alignment     y- and y+ token by token: U0, U1-, U1+
    (1)-(4)       the rewards r_t, R, the margin s, the loss of the reward model term by term
    (5)-(6)       y- as a response of the policy: r_t calibrated, its KL, the advantage
    (7)           one update on y- alone, then the ratio, the clip and the loss, token by token

Nothing is computed here that training does not compute: rewards, losses, advantages and the update
come from the functions that train_rm.py and train_ppo.py call. What training takes over a whole
batch (the averages of (4), the scale of (6), the mean of (7)) is here over this one record.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from fgrlhf.advantage import penalise_kl, reward_to_go, standardise
from fgrlhf.edits import Edit, Pair
from fgrlhf.encode import align_sides, encode_preferences, two_sides
from fgrlhf.files import read_bytes
from fgrlhf.model import LLaMA
from fgrlhf.optimizer import Optimizer
from fgrlhf.ppo import policy_loss
from fgrlhf.reward import RewardModel, token_loss
from fgrlhf.rollout import pack, score
from kernels import clipped_surrogate, token_preference


class LossSettings(NamedTuple):
    """What train_rm.py decides about a record; the defaults are equation (4) as the paper has it.

    Names and meanings are those of its flags; `model` is where the training started.
    """

    template: str = "plain"
    prompt_tokens: int | None = None
    normalise: bool = False
    unit: str = "token"
    credit_gap: bool = True
    reduce: str = "sum"
    u0: str = "difference"
    u0_weight: float = 1.0
    token_weight: float = 0.0
    model: str | None = None

    @property
    def options(self) -> token_preference.Options:
        return token_preference.Options(self.reduce, self.u0, self.u0_weight, self.token_weight)


class UpdateSettings(NamedTuple):
    """What train_ppo.py decides about a response; its names and its defaults."""

    beta: float = 0.5
    gamma: float = 0.0
    standardise: str = "rms"
    clip_eps: float = 0.2
    temperature: float = 1.0
    lr: float = 1.2e-3
    policy: str | None = None           # the reference


class Side(NamedTuple):
    """One response, token by token."""

    pieces: list[str]                   # as the tokenizer has them; the blank is U+2581
    texts: list[str]                    # what each adds to the text; "</s>" for EOS
    sets: list[str]                     # U0, U1, gap (in U1 for what is missing before it) or ""
    rewards: list[float]                # r_t on the reward model's own scale

    @property
    def total(self) -> float:
        """R, equation (1)."""
        return sum(self.rewards)

    def changed(self) -> list[float]:
        """The rewards of U1."""
        return [r for r, name in zip(self.rewards, self.sets) if name in ("U1", "gap")]


class Loss(NamedTuple):
    """Equation (4) on one record, by kernels/token_preference.py."""

    options: token_preference.Options
    margin: float                       # s
    bt: float
    u0: float
    token: float
    total: float


class Update(NamedTuple):
    """Equations (5)-(7) on y- as a response; every list has one entry a token."""

    settings: UpdateSettings
    calibrated: list[float]             # (r_t - mean) / scale
    logp_old: list[float]               # log pi of the policy, nats
    logp_ref: list[float]
    penalised: list[float]              # r~_t, equation (5)
    advantages: list[float]             # equation (6)
    logp: list[float]                   # after one update on this response
    ratio: list[float]
    objective: list[float]              # min(rho A, clip(rho) A)
    clipped: list[bool]                 # whether the clip is the smaller: no gradient from it
    loss_before: float                  # L_clip at ratio 1, and after the update
    loss: float

    @property
    def kl(self) -> list[float]:
        """logp_old - logp_ref, nats."""
        return [old - ref for old, ref in zip(self.logp_old, self.logp_ref)]


class Worked(NamedTuple):
    """Everything that is shown of one record."""

    id: str
    prompt: str
    rejected: Side
    chosen: Side
    rows: list[tuple[int | None, int | None]]       # both sides as one list, paired where unchanged
    pairs: list[tuple[int, int]]                    # U0: (rejected, chosen)
    loss: Loss
    paper: Loss                                     # equation (4) as the paper has it, lambda = 1
    mean: float                                     # of the calibration
    scale: float
    update: Update | None


def settings_of(kind: type, folder: str | Path):
    """LossSettings or UpdateSettings of the run that wrote `folder`, from config.json beside it.

    A folder without one, or from another kind of run (SFT), has the defaults.
    """
    path = Path(folder).resolve().parent / "config.json"
    saved = json.loads(read_bytes(path)) if path.is_file() else {}
    if {LossSettings: "u0", UpdateSettings: "beta"}[kind] not in saved:
        return kind()
    return kind(**{name: saved[name] for name in kind._fields if name in saved})


def work(record: Edit | Pair, tokenizer, reward: RewardModel, settings: LossSettings,
         policy: LLaMA | None = None, reference: LLaMA | None = None,
         update: UpdateSettings = UpdateSettings()) -> Worked:
    """Work one record through. With a policy, y- is taken as its response, and it is UPDATED once.

    reward: a token-level model. reference: the frozen model of the KL, of the policy's kind.
    """
    ids = encode_preferences([record], tokenizer, reward.trunk.config.max_seq_len,
                             settings.template, settings.prompt_tokens, settings.unit,
                             settings.credit_gap)[0]
    better, worse = two_sides(record)
    aligned, _ = align_sides(tokenizer, worse, better, ids.rejected, ids.chosen, settings.unit)
    sequences = pack([ids.prompt] * 2, [ids.chosen, ids.rejected],
                     device=reward.head.weight.device)
    with torch.no_grad():
        rewards = reward.token_rewards(sequences).tolist()
        loss, paper = (_loss(reward, ids, options)
                       for options in (settings.options, token_preference.Options()))
    sides = []
    for tokens, values, changed, credited, unchanged in (
            (ids.rejected, rewards[1], aligned.original_changed, ids.minus,
             {i for _, i in ids.unchanged}),
            (ids.chosen, rewards[0], aligned.edited_changed, ids.plus,
             {j for j, _ in ids.unchanged})):
        sets = ["U1" if changed[t] else "gap" if t in credited else "U0" if t in unchanged else ""
                for t in range(len(tokens))]
        pieces = [tokenizer.pieces[token].text for token in tokens]
        sides.append(Side(pieces, surfaces(tokenizer, tokens), sets, values[:len(tokens)]))
    done = None
    if policy is not None:
        done = _update(ids, reward, policy, reference, update)
    return Worked(record.id, tokenizer.decode(ids.prompt), *sides,
                  _rows(aligned.pairs, len(ids.rejected), len(ids.chosen)),
                  [(i, j) for j, i in ids.unchanged], loss, paper, reward.mean.item(),
                  reward.scale.item(), done)


def surfaces(tokenizer, ids: list[int]) -> list[str]:
    """What each id adds to the text; of a character in several byte pieces the first has it."""
    text, end, parts = tokenizer.decode(ids), 0, []
    for token, (start, stop) in zip(ids, tokenizer.spans(ids)):
        parts.append("</s>" if token == tokenizer.eos_id else text[max(start, end):stop])
        end = max(end, stop)
    return parts


def _loss(reward: RewardModel, ids, options: token_preference.Options) -> Loss:
    out = token_loss(reward, [ids], options)
    return Loss(options, out.margin.item(), out.bt.item(), out.u0.item(), out.token.item(),
                out.loss.item())


def _rows(pairs: list[tuple[int, int]], n: int, m: int) -> list[tuple[int | None, int | None]]:
    """The tokens of both sides in one list: pairs share a row, changed ones are laid side by side.

    >>> _rows([(0, 0), (2, 1)], 3, 3)
    [(0, 0), (1, None), (2, 1), (None, 2)]
    """
    rows, i, j = [], 0, 0
    for next_i, next_j in [*pairs, (n, m)]:
        for k in range(max(next_i - i, next_j - j)):
            rows.append((i + k if i + k < next_i else None, j + k if j + k < next_j else None))
        rows.append((next_i, next_j))
        i, j = next_i + 1, next_j + 1
    return rows[:-1]                                        # without the end


def _update(ids, reward: RewardModel, policy: LLaMA, reference: LLaMA,
            settings: UpdateSettings) -> Update:
    """Steps 2 to 5 of train_ppo.py on one response, with one gradient step of the policy."""
    sequences = pack([ids.prompt], [ids.rejected], device=reward.head.weight.device)
    mask, T = sequences.response_mask, len(ids.rejected)
    with torch.no_grad():
        calibrated = reward.ppo_rewards(sequences)
        logp_old = score(policy, sequences, settings.temperature)
        logp_ref = score(reference, sequences, settings.temperature)
        penalised = penalise_kl(calibrated, logp_old, logp_ref, mask, settings.beta)
        advantages = standardise(reward_to_go(penalised, mask, settings.gamma), mask,
                                 settings.standardise)
    loss = lambda: policy_loss(policy, sequences, logp_old, advantages, settings.clip_eps,
                               settings.temperature, T)
    before = loss()
    before.loss.backward()
    Optimizer(policy, settings.lr).step()
    with torch.no_grad():
        after = loss()
        log_ratio = after.logp - logp_old[0]
        objective, _ = clipped_surrogate.objective(log_ratio, advantages[0], settings.clip_eps)
    ratio, A = log_ratio.exp().tolist(), advantages[0].tolist()
    clipped = [a > 0 and r > 1 + settings.clip_eps or a < 0 and r < 1 - settings.clip_eps
               for r, a in zip(ratio, A)]
    return Update(settings, calibrated[0].tolist(), logp_old[0].tolist(), logp_ref[0].tolist(),
                  penalised[0].tolist(), A, after.logp.tolist(), ratio, objective.tolist(), clipped,
                  before.loss.item(), after.loss.item())


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), for any x without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def minus_log_sigmoid(x: float) -> float:
    """log(1 + e^-x), for any x without overflow."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))
