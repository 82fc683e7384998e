"""The rules that keep the method correct, tried on one batch of a user's own models.

Each function takes a Subject (a PPO run before its first step) and a Rollout sampled from it. It
returns a Check: whether the rule holds, the number that decided, and what to do if it does not.
startup.py runs them all. fgrlhf/README.md lists the rules by number, and rounding.py says how far
two computations of one log-probability may differ.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fgrlhf.advantage import penalise_kl, reward_to_go, standardise
from fgrlhf.checks.rounding import COARSE, FINE, Rounding
from fgrlhf.evaluate import constant
from fgrlhf.model import LLaMA
from fgrlhf.own_reward import OwnReward
from fgrlhf.ppo import kl_estimates, policy_loss
from fgrlhf.reward import RewardModel
from fgrlhf.rollout import Rollout
from fgrlhf.sequences import Sequences, by_length, score
from fgrlhf.tokenizer import Tokenizer


class Subject(NamedTuple):
    """One PPO run before its first step: the policy is still the reference."""

    policy: LLaMA
    ref: LLaMA
    reward_model: RewardModel | OwnReward
    tokenizer: Tokenizer
    prompts: list[list[int]]            # ids, BOS first
    max_new_tokens: int
    temperature: float
    beta: float
    rollouts: int                       # responses per iteration
    microbatch: int                     # sequences per forward pass
    critic: nn.Module | None = None
    rounding: Rounding = Rounding(True)
    decode_batch: int = 0               # responses decoded at once; 0: all
    offload: bool = False               # reference and reward model in host memory between uses
    checkpoint_activations: bool = False


class Check(NamedTuple):
    """The result of one check. `number` decided; `advice` is what to do when the check failed."""

    passed: bool
    number: str
    advice: str


def distance(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|, infinite when a number is not finite."""
    worst = (a - b).abs().max().item()
    return worst if worst == worst else float("inf")


# ----- rollouts and scoring -----------------------------------------------------------------------

def ragged(sequences: Sequences) -> Sequences:
    """Cuts every other response to its first half, so that there is padding in any case."""
    lengths = sequences.response_lengths
    odd = torch.arange(len(lengths), device=lengths.device) % 2 == 1
    return sequences._replace(response_lengths=torch.where(odd, (lengths + 1) // 2, lengths))


def masks_count(s: Subject, rollout: Rollout) -> Check:
    """Rule 4: the mask counts each response to its first EOS, or all of a truncated one."""
    sequences, eos = rollout.sequences, s.tokenizer.eos_id
    mask, counted = sequences.response_mask.tolist(), 0
    wrong = []
    for row, (ids, start) in enumerate(zip(sequences.tokens.tolist(),
                                           sequences.prompt_lengths.tolist())):
        length = sum(mask[row])
        response, counted = ids[start:start + length], counted + length
        ends = eos in response[:-1], response[-1:] == [eos]
        logp = rollout.logp_old[row]
        if (len(response) != length or mask[row] != [t < length for t in range(len(mask[row]))]
                or ends != (False, not rollout.truncated[row])
                or (logp[:length] > 0).any() or logp[length:].any()):
            wrong.append(row)
    short = ragged(sequences)
    if (short.response_mask.sum(1) != short.response_lengths).any():
        wrong.append("cut ones")
    return Check(not wrong, f"{counted} tokens in {len(mask)} responses, "
                 f"{int(rollout.truncated.sum())} truncated; miscounted rows: {wrong or 'none'}",
                 "masks come from lengths, and EOS is the last token of a finished response: see "
                 "response_mask in fgrlhf/sequences.py and sample in fgrlhf/rollout.py")


def sampling_equals_scoring(s: Subject, rollout: Rollout) -> Check:
    """Rule 2: the log-probabilities of sampling (KV cache) equal those of scoring.

    In bfloat16 they are equal but for the rounding, and exactly in the float32 copy.
    """
    mask = rollout.sequences.response_mask
    with torch.no_grad():
        again = score(s.policy, rollout.sequences, s.temperature)
    worst = s.rounding.apart(again[mask], rollout.logp_old[mask])
    number = f"|log ratio| {worst:.1e} nats, {s.rounding}"
    if s.rounding.nats is not None:
        number += f"; in a float32 copy {s.rounding.exact:.1e}, at most {FINE:g}"
    return Check(worst <= s.rounding.bound and s.rounding.exact <= FINE, number,
                 "sampling and scoring compute different functions: look for another temperature, "
                 "lower precision, dropout or a wrong KV cache")


def ratio_is_one(s: Subject, rollout: Rollout) -> Check:
    """Rule 2: the update's first ratio is 1, and KL to a reference equal to the policy is 0.

    In bfloat16 `rollout` was scored again, as train_ppo.py does, so one bound serves every dtype.
    """
    mask = rollout.sequences.response_mask
    out = policy_loss(s.policy, rollout.sequences, rollout.logp_old,
                      torch.ones_like(rollout.logp_old), 0.2, s.temperature, int(mask.sum()))
    worst = distance(out.logp, rollout.logp_old[mask])
    with torch.no_grad():
        kl = kl_estimates(rollout.logp_old, score(s.ref, rollout.sequences, s.temperature), mask)
    passed = max(worst, abs(kl["kl_k1"]), abs(kl["kl_k3"])) <= FINE
    return Check(passed, f"largest |ratio - 1| {worst:.1e}, KL k1 {kl['kl_k1']:.1e}, "
                 f"k3 {kl['kl_k3']:.1e} nats per token, at most {FINE:g}",
                 "the reference must be the policy as it starts, scored at the same temperature")


def padding_is_inert(s: Subject, rollout: Rollout) -> Check:
    """Rule 5: other ids in the padding, and NaN in the padding of every input, change no number."""
    sequences = ragged(rollout.sequences)
    mask = sequences.response_mask
    logp_old = rollout.logp_old[:, :mask.shape[1]]
    real = (torch.arange(sequences.tokens.shape[1], device=mask.device)
            < sequences.lengths[:, None])
    other = sequences.tokens.roll(1, 0).flip(1) % s.policy.config.vocab_size
    spoiled = sequences._replace(tokens=torch.where(real, sequences.tokens, other))

    def numbers(batch: Sequences, padding: float) -> list[Tensor]:
        given = torch.where(mask, logp_old, padding)
        advantages = torch.where(mask, torch.ones_like(given), padding)
        out = policy_loss(s.policy, batch, given, advantages, 0.2, s.temperature, int(mask.sum()))
        rewards = torch.where(mask, s.reward_model.ppo_rewards(batch), padding)
        penalised = penalise_kl(rewards, given, score(s.ref, batch, s.temperature), mask, s.beta)
        spoilt = torch.where(mask, penalised, padding)
        return [out.loss, score(s.policy, batch, s.temperature), penalised,
                standardise(spoilt, mask, "rms"), standardise(spoilt, mask, "mean-std")]

    with torch.no_grad():
        clean, spoilt = numbers(sequences, 0.0), numbers(spoiled, float("nan"))
        alone = [score(s.policy, sequences.rows(slice(b, b + 1)), s.temperature)[0]
                 for b in range(len(mask))]
    padded, worst = clean[1], max(distance(a, b) for a, b in zip(clean, spoilt))
    lone = s.rounding.apart(torch.cat(alone), torch.cat(
        [padded[b, :len(row)] for b, row in enumerate(alone)]))
    return Check(worst <= 1e-5 and lone <= s.rounding.bound,
                 f"garbage in {int((~real).sum())} padding slots changes results by {worst:.1e}, "
                 f"a batch of one row by {lone:.1e} nats",
                 "something reads padding: every mean, sum and gather must use response_mask")


# ----- rewards and gradients ----------------------------------------------------------------------

def planted_reward_stays(s: Subject, rollout: Rollout) -> Check:
    """Rule 1: a reward on token k gives a gradient only at the state that produced token k."""
    sequences, mask = rollout.sequences, rollout.sequences.response_mask
    row = int(sequences.response_lengths.argmax())
    length, start = int(sequences.response_lengths[row]), int(sequences.prompt_lengths[row])
    with torch.no_grad():
        hidden = s.policy.hidden(sequences.tokens)
    moved = {}
    for k in sorted({0, length // 2, length - 1}):
        states = hidden.clone().requires_grad_()
        stub = SimpleNamespace(hidden=lambda tokens, **_: states, head=s.policy.head.detach())
        planted = torch.zeros_like(rollout.logp_old)
        planted[row, k] = 1.0
        penalised = penalise_kl(planted, rollout.logp_old, rollout.logp_old, mask, s.beta)
        advantages = standardise(reward_to_go(penalised, mask, 0.0), mask, "rms")
        out = policy_loss(stub, sequences, rollout.logp_old, advantages, 0.2, s.temperature,
                          int(mask.sum()))
        gradient, = torch.autograd.grad(out.loss, states)
        moved[k] = [(b, p - start) for b, p in gradient.abs().sum(-1).nonzero().tolist()]
    passed = all(found == [(row, k - 1)] for k, found in moved.items())
    return Check(passed, f"rewards on tokens {list(moved)} reach the states before tokens "
                 f"{[[k + 1 for _, k in found][:3] for found in moved.values()]}",
                 "logp, reward and advantage of token t must share index t: look for a shift")


def values_of(s: Subject, rewards: Tensor, mask: Tensor) -> tuple[Tensor, str]:
    """Returns the numbers that the reward model gives, and the unit that each is given to."""
    if s.reward_model.kind == "token":
        return rewards[mask], "token"
    return rewards.sum(1), "response"


def rewards_belong(s: Subject, rollout: Rollout) -> Check:
    """Rule 1: changing token k changes its reward and no reward before it; PAD has no reward.

    A function as reward may look ahead, and is checked by `own_rewards_repeat`.
    """
    own = isinstance(s.reward_model, OwnReward)
    sequences = ragged(rollout.sequences)
    mask, row = sequences.response_mask, int(sequences.response_lengths.argmax())
    length, start = int(sequences.response_lengths[row]), int(sequences.prompt_lengths[row])

    one = sequences.rows(slice(row, row + 1))

    def first_moved(f, k: int) -> list[int]:
        tokens = one.tokens.clone()
        tokens[0, start + k] = (tokens[0, start + k] + 1) % s.policy.config.vocab_size
        moved = (f(one._replace(tokens=tokens)) - f(one))[0].abs() > 1e-6
        return moved.nonzero()[:1].flatten().tolist()

    changed, found, wanted = sorted({length // 2, length - 1}), [], []
    with torch.no_grad():
        rewards = s.reward_model.ppo_rewards(sequences)
        for k in changed:
            if not own:
                found.append(first_moved(s.reward_model.ppo_rewards, k))
                wanted.append([k if s.reward_model.kind == "token" else length - 1])
            if s.critic is not None:
                found.append(first_moved(s.critic, k))
                wanted.append([k + 1][:length - k - 1])
    if own and found != wanted:
        return Check(False, f"critic: first change at {found}, expected {wanted}",
                     "read the critic's value one position before its token")
    if own:
        return own_rewards_repeat(s, sequences, rewards)
    on_padding = int(rewards[~mask].count_nonzero())
    off_last = 0
    if s.reward_model.kind == "sequence":
        steps = torch.arange(mask.shape[1], device=mask.device)
        off_last = int(rewards[steps != sequences.response_lengths[:, None] - 1].count_nonzero())
    finite = bool(rewards.isfinite().all())
    values, unit = values_of(s, rewards, mask)
    raw = (values * s.reward_model.scale + s.reward_model.mean).tolist()    # as it was trained
    if finite and (said := constant(raw, [1] * len(raw) if unit == "token" else None)):
        return Check(False, said, "train it longer or on other data")
    return Check(found == wanted and on_padding == off_last == 0 and finite,
                 f"tokens {changed} changed: first change at {found}, expected {wanted}; rewards "
                 f"on padding {on_padding}, finite {finite}",
                 "read a token's reward at its own position, a response's at its last token, the "
                 "critic's value one position earlier")


def own_rewards_repeat(s: Subject, sequences: Sequences, rewards: Tensor) -> Check:
    """Compares the rewards [B, T] of a function with those of each response in a call of its own.

    Rewards that do not vary are no failure: a few responses may lack what the function looks for.
    """
    values, unit = values_of(s, rewards, sequences.response_mask)
    worst = 0.0
    for b, n in enumerate(sequences.response_lengths.tolist()):
        alone = s.reward_model.ppo_rewards(sequences.rows(slice(b, b + 1)))[0]
        worst = max(worst, distance(rewards[b, :n], alone))
    number = f"the reward of a response in a call of its own differs by {worst:.1e}"
    if (values == values[0]).all():
        number += f"; every {unit} has the reward {values[0]:g}, so there may be nothing to learn"
    return Check(worst <= 1e-5 * max(1, rewards.abs().max().item()), number,
                 "the function must depend on the response and its prompt only, and draw nothing")


def microbatches_agree(s: Subject, rollout: Rollout) -> Check:
    """Rule 6: the gradient of the minibatch equals the sum over its microbatches."""
    trainable = [p for p in s.policy.parameters() if p.requires_grad]
    few = [p for p in trainable if p.dim() == 1] or trainable       # norms: small at every size
    mask = rollout.sequences.response_mask
    advantages = torch.where(mask, rollout.logp_old - rollout.logp_old[mask].mean(), 0.0)

    def gradient(size: int) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in few]
        for rows in by_length(rollout.sequences, list(range(len(mask))), size):
            part = rollout.sequences.rows(rows)
            T = int(part.response_lengths.max())
            out = policy_loss(s.policy, part, rollout.logp_old[rows, :T], advantages[rows, :T], 0.2,
                              s.temperature, int(mask.sum()))
            for so_far, g in zip(total, torch.autograd.grad(out.loss, few)):
                so_far += g
        return total

    whole, split = gradient(0), gradient(3)
    scale = max(g.abs().max().item() for g in whole)
    worst = max(distance(a, b) for a, b in zip(whole, split)) / max(scale, 1e-12)
    most = FINE if s.rounding.wide else COARSE
    return Check(worst <= most, f"largest difference {worst:.1e} of the largest gradient "
                 f"{scale:.1e}, at most {most:g}",
                 "means must be over the tokens of the whole minibatch: pass its count as "
                 "denominator")


def scales_side_by_side(s: Subject, rollout: Rollout) -> Check:
    """Compares the spread of the rewards with the cost of one nat of KL, which is beta."""
    mask = rollout.sequences.response_mask
    with torch.no_grad():
        rewards = s.reward_model.ppo_rewards(rollout.sequences)
    values, unit = values_of(s, rewards, mask)
    spread = values.std(correction=0).item()
    if spread == 0 and isinstance(s.reward_model, OwnReward):       # see own_rewards_repeat
        return Check(True, f"reward per {unit} {values[0]:+.2f}, it does not vary in these "
                     f"responses; a nat of KL costs beta = {s.beta:g}", "")
    return Check(0 < spread < float("inf"),
                 f"reward per {unit} {values.mean():+.2f} +- {spread:.2f}; a nat of KL costs beta "
                 f"= {s.beta:g}; beta {spread:.2g} makes it cost one standard deviation",
                 "the rewards do not vary: train the reward model longer or on other data")
