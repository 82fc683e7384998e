"""Computes the numbers of one record in every step of the method (paper, sections 2.1 and 2.2).

    alignment     y- and y+ token by token: U0, U1-, U1+
    (1)-(4)       the rewards r_t, R, the margin s, each term of the reward model's loss
    (5)-(6)       y- as a response of the policy: calibrated r_t, KL, advantage
    (7)           one update on y- only, then ratio, clip and loss of each token

Rewards, losses, advantages and the update come from the functions that train_rm.py and train_ppo.py
call. Training averages over a batch in (4), (6) and (7); here the batch is this one record.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch

from fgrlhf.advantage import (
    penalise_kl, penalise_missing_eos, reward_to_go, standardise, without_eos)
from fgrlhf.data.fields import UserError, check
from fgrlhf.data.files import read_object
from fgrlhf.data.records import Edit, Pair
from fgrlhf.encode import Encoder, PreferenceIds, two_sides
from fgrlhf.engine.encoding import read_encoding
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.engine.places import relocated
from fgrlhf.model import LLaMA
from fgrlhf.ppo import policy_loss
from fgrlhf.reward import PreferenceBatch, RewardModel, token_loss
from fgrlhf.sequences import pack, score
from fgrlhf.tokenizer import Tokenizer
from kernels import clipped_surrogate, token_preference


class LossSettings(NamedTuple):
    """The settings of train_rm.py that concern one record, with the names of its flags.

    The defaults give the paper's loss. `model`: the model that training started from.
    """

    template: str = "plain"
    prompt_tokens: int | None = None
    normalise: bool = False
    cut_responses: bool = False
    unit: str = "token"
    credit_gap: bool = True
    reduce: str = "response"
    u0: str = "difference"
    u0_weight: float = 0.0
    token_weight: float = 0.0
    pair_weight: float = 1.0
    model: str | None = None

    @property
    def options(self) -> token_preference.Options:
        return token_preference.Options(self.reduce, self.u0, self.u0_weight, self.token_weight,
                                        self.pair_weight)


class UpdateSettings(NamedTuple):
    """The settings of train_ppo.py that concern one response, with its names and defaults."""

    beta: float = 0.5
    gamma: float = 0.0
    standardise: str = "rms"
    clip_eps: float = 0.2
    temperature: float = 1.0
    lr: float = 1.2e-3
    reward_eos: bool = True
    missing_eos_penalty: float = 0.0
    policy: str | None = None           # the reference


# The flag that no other training script has than train_rm.py, or than train_ppo.py.
ONLY_IN = {LossSettings: "u0", UpdateSettings: "method"}


class Side(NamedTuple):
    """One response. Each list has one entry per token."""

    pieces: list[str]                   # of the tokenizer, with U+2581 for a blank
    texts: list[str]                    # the characters it adds to the text; EOS by its name
    sets: list[str]                     # "U0", "U1", "gap" (in U1 by the gap rule) or ""
    rewards: list[float]                # r_t on the scale of the reward model

    @property
    def total(self) -> float:
        """R, equation (1)."""
        return sum(self.rewards)

    def changed(self) -> list[float]:
        """The rewards of the tokens in U1."""
        return [r for r, name in zip(self.rewards, self.sets) if name in ("U1", "gap")]


class Loss(NamedTuple):
    """The terms of equation (4) for one record, by kernels/token_preference.py."""

    options: token_preference.Options
    margin: float                       # s
    bt: float
    u0: float
    token: float
    total: float


class Update(NamedTuple):
    """Equations (5) to (7) for y- as a response. Each list has one entry per token."""

    settings: UpdateSettings
    calibrated: list[float]             # (r_t - mean) / scale, except at the tokens of `apart`
    apart: dict[int, str]               # tokens whose reward the run sets otherwise, and how
    logp_old: list[float]               # log pi of the policy, nats
    logp_ref: list[float]
    penalised: list[float]              # r~_t, equation (5)
    advantages: list[float]             # equation (6)
    logp: list[float]                   # after one update on this response
    ratio: list[float]
    objective: list[float]              # min(rho A, clip(rho) A)
    clipped: list[bool]                 # True when the clipped value is smaller: no gradient
    loss_before: float                  # L_clip before the update, when every ratio is 1
    loss: float                         # L_clip after the update

    @property
    def kl(self) -> list[float]:
        """logp_old - logp_ref, nats."""
        return [old - ref for old, ref in zip(self.logp_old, self.logp_ref)]

    @property
    def columns(self) -> dict[str, list[float]]:
        """The columns of the table of tokens, in order, by the names that are shown."""
        return {"r_t": self.calibrated, "logp_old": self.logp_old, "logp_ref": self.logp_ref,
                "KL": self.kl, "r~_t": self.penalised, "A_t": self.advantages, "logp": self.logp,
                "rho": self.ratio}


class Explained(NamedTuple):
    """Everything that is shown about one record."""

    id: str
    prompt: str
    rejected: Side
    chosen: Side
    rows: list[tuple[int | None, int | None]]       # (rejected, chosen) tokens, row by row
    pairs: list[tuple[int, int]]                    # U0: (rejected, chosen)
    loss: Loss
    paper: Loss                                     # the paper's loss
    response: str                                   # "mean" or "sum": R of equation (1)
    mean: float                                     # mean and scale of the calibration
    scale: float
    update: Update | None


def config_of(folder: str | Path) -> tuple[Path, dict]:
    """Returns the path and the content of config.json of the run that wrote `folder`.

    The content is {} when there is no such file.
    """
    file = Path(folder).resolve().parent / "config.json"
    return file, read_object(file) if file.is_file() else {}


def has_settings(kind: type, folder: str | Path) -> bool:
    """Tells whether config.json of the run that wrote `folder` has the settings of `kind`.

    Other methods of train_ppo.py than fine-grained have none: their advantages are not shown here.
    """
    saved = config_of(folder)[1]
    other_method = kind is UpdateSettings and saved.get("method") != "fine-grained"
    return ONLY_IN[kind] in saved and not other_method


def trained_from(folder: str | Path) -> tuple[str, str | None]:
    """Returns the flag of the model from which the run that wrote `folder` started, and its path.

    The path is None when config.json names no model.
    """
    file, saved = config_of(folder)
    name = "policy" if ONLY_IN[UpdateSettings] in saved else "model"
    start, out = (check(str | None, saved.get(n), str(file), n) for n in (name, "out"))
    if start and out:                                   # the run may have been copied or moved
        start = relocated(start, out, file.parent)
    return name, start


def settings_of(kind: type, folder: str | Path):
    """Reads the settings, LossSettings or UpdateSettings, of the run that wrote `folder`.

    They are in config.json in the folder above, and how records became ids is in the folder itself.
    Settings that are in neither have their defaults, as for a folder of another kind of run, such
    as SFT or DPO.
    """
    encoding = read_encoding(folder) if kind is LossSettings else None
    remembered = {} if encoding is None else encoding._asdict()
    if (hidden := remembered.pop("hide", "nothing")) != "nothing":
        raise UserError(f"{folder}: expected a reward model that sees whole records, got a control "
                        f"(--hide {hidden}); train one without --hide")
    file, saved = config_of(folder)
    if not has_settings(kind, folder):
        return kind(**remembered)
    kinds, (name, start) = get_type_hints(kind), trained_from(folder)
    saved = {n: check(kinds[n], saved[n], str(file), n) for n in kinds if n in saved}
    return kind(**saved | {name: start} | remembered)


def explain_record(record: Edit | Pair, tokenizer: Tokenizer, reward: RewardModel,
                   settings: LossSettings, policy: LLaMA | None = None,
                   reference: LLaMA | None = None,
                   update: UpdateSettings = UpdateSettings()) -> Explained:
    """Computes all numbers of one record. One update CHANGES the policy, whose response is y-.

    reward: a token-level model. reference: the frozen model of the KL. Without a policy there are
    no equations (5) to (7).
    """
    encoder = Encoder(tokenizer, reward.trunk.config.max_seq_len, settings.template,
                      settings.prompt_tokens, settings.cut_responses, settings.unit,
                      settings.credit_gap)
    ids, (better, worse) = encoder.preference(record), two_sides(record)
    encoder.counted(f"record {record.id!r}")
    aligned, _ = encoder.align_by_unit(worse, better, *(tokenizer.encode(text, eos=True)
                                                        for text in (worse, better)))
    pairs = [(i, j) for i, j in aligned.pairs if i < len(ids.rejected) and j < len(ids.chosen)]
    sequences = pack([ids.prompt] * 2, [ids.chosen, ids.rejected], device=reward.device)
    with torch.no_grad():
        plus, minus = reward.token_rewards(sequences).tolist()
        loss, paper = (_loss(reward, ids, options)
                       for options in (settings.options, token_preference.Options()))
    kept_plus, kept_minus = ({pair[side] for pair in ids.unchanged} for side in (0, 1))
    rejected = _side(tokenizer, ids.rejected, minus, aligned.original_changed, ids.minus,
                     kept_minus)
    chosen = _side(tokenizer, ids.chosen, plus, aligned.edited_changed, ids.plus, kept_plus)
    done = None if policy is None else _update(ids, reward, policy, reference, update,
                                               tokenizer.eos_id)
    return Explained(record.id, prompt_text(tokenizer, ids.prompt), rejected, chosen,
                     _rows(pairs, len(ids.rejected), len(ids.chosen)),
                     [(i, j) for j, i in ids.unchanged], loss, paper, reward.response,
                     reward.mean.item(), reward.scale.item(), done)


def _side(tokenizer: Tokenizer, ids: list[int], rewards: list[float], changed: list[bool],
          credited: list[int], unchanged: set[int]) -> Side:
    """credited, unchanged: positions in U1 and in U0. A credited token may be unchanged: a gap."""
    sets = ["U1" if changed[t] else "gap" if t in credited else "U0" if t in unchanged else ""
            for t in range(len(ids))]
    return Side([tokenizer.pieces[token].text for token in ids], surfaces(tokenizer, ids), sets,
                rewards[:len(ids)])


def surfaces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Returns the characters that each id adds to the text, and the name of EOS, such as "</s>".

    A character of several byte pieces belongs to the first of them.
    """
    return [tokenizer.pieces[token].text if token == tokenizer.eos_id else text
            for token, text in zip(ids, tokenizer.texts(ids))]


def prompt_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Returns the text of a prompt, with the names of its control tokens but the first BOS."""
    names = {id: text for text, id in tokenizer.control.items()}
    skipped = tokenizer.adds_bos and ids[:1] == [tokenizer.bos_id]
    return "".join(tokenizer.decode(run) if name is None else name * len(list(run))
                   for name, run in itertools.groupby(ids[skipped:], names.get))


def _loss(reward: RewardModel, ids: PreferenceIds, options: token_preference.Options) -> Loss:
    out = token_loss(reward, PreferenceBatch.of([ids], reward.device), options)
    return Loss(options, out.margin.item(), out.bt.item(), out.u0.item(), out.token.item(),
                out.loss.item())


def _rows(pairs: list[tuple[int, int]], n: int, m: int) -> list[tuple[int | None, int | None]]:
    """Returns the tokens of both sides row by row. A pair shares a row, and changes share rows.

    >>> _rows([(0, 0), (2, 1)], 3, 3)
    [(0, 0), (1, None), (2, 1), (None, 2)]
    """
    rows, i, j = [], 0, 0
    for next_i, next_j in [*pairs, (n, m)]:
        for k in range(max(next_i - i, next_j - j)):
            rows.append((i + k if i + k < next_i else None, j + k if j + k < next_j else None))
        rows.append((next_i, next_j))
        i, j = next_i + 1, next_j + 1
    return rows[:-1]                                        # without the pair of the two ends


def _update(ids: PreferenceIds, reward: RewardModel, policy: LLaMA, reference: LLaMA,
            settings: UpdateSettings, eos_id: int) -> Update:
    """Runs steps 2 to 5 of train_ppo.py on one response, with one gradient step."""
    sequences = pack([ids.prompt], [ids.rejected], device=reward.device)
    mask, T, apart = sequences.response_mask, len(ids.rejected), {}
    with torch.no_grad():
        calibrated = reward.ppo_rewards(sequences)
        if ids.rejected[-1] == eos_id and not settings.reward_eos:
            calibrated = without_eos(calibrated, sequences, eos_id)
            apart[T - 1] = "0, because EOS gets no reward (--no-reward-eos)"
        if ids.rejected[-1] != eos_id and settings.missing_eos_penalty:
            calibrated = penalise_missing_eos(calibrated, sequences, mask.any(-1),
                                              settings.missing_eos_penalty)
            apart[T - 1] = f"{settings.missing_eos_penalty:g} less, because EOS is missing"
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
    return Update(settings, calibrated[0].tolist(), apart, logp_old[0].tolist(),
                  logp_ref[0].tolist(), penalised[0].tolist(), A, after.logp.tolist(), ratio,
                  objective.tolist(), clipped, before.loss.item(), after.loss.item())


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), without overflow for any x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def minus_log_sigmoid(x: float) -> float:
    """log(1 + e^-x), without overflow for any x."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))
