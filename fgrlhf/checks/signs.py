"""Signs of trouble in a PPO run, read from its metrics.jsonl, each with its usual remedy.

    unchanged   no iteration had an update
    cut         most responses end at --max-new-tokens and not with EOS
    far         the KL from the SFT policy is high
    narrow      the entropy has collapsed: the policy repeats itself
    clipped     many tokens are clipped in several iterations: the updates are too large
    exploited   the reward goes up while the dev win rate goes down
    flat        the dev win rate never leaves that of the SFT policy

train_ppo.py names them at its end, and the report of fgrlhf.reproduce has them. They are signs, not
proofs. The thresholds of the last five come from 72 runs of 12 systems that worked (profile full,
worlds 400 to 407 of the built-in world, 30 iterations, 200 dev prompts): each is twice the worst
value of those runs, which is in the comment behind it. Runs with models or rewards of another kind
may differ.
"""

import json
from collections.abc import Sequence
from pathlib import Path

LEAST_ITERATIONS = 10           # a shorter run shows nothing yet
KL_PER_TOKEN = 0.9              # nats; worst: 0.46 (sum loss)
TRUNCATED = 0.5                 # of the responses in the last LEAST_ITERATIONS; worst of 563: 0.13
ENTROPY_LEFT = 0.23             # of the entropy of iteration 1; worst: 0.47 (imperfect editor)
CLIP_FRACTION = 0.14            # in CLIPPED_ITERATIONS; worst fourth-highest: 0.07 (sum loss)
CLIPPED_ITERATIONS = 4
WIN_RATE_LOST = 0.13            # best minus last; worst: 0.065 (sum loss)
# The highest win rate of five runs with learning rate 0, and more than that of five runs with the
# log-likelihood as reward. Of the 72 runs, one with the sum loss is below it.
FLAT_WIN_RATE = 0.57


def signs(lines: Sequence[dict]) -> list[str]:
    """Returns a sentence for each sign of trouble, [] for a healthy run.

    lines: those of metrics.jsonl, in order. An iteration without an update has no figures of one
    (--mask-truncated, when no response has an EOS), so only the signs "unchanged" and "cut" look at
    it. Except for "unchanged", a run with fewer than LEAST_ITERATIONS shows no signs. A run that is
    not PPO never has any.
    """
    updated = [line for line in lines if "ppo/entropy" in line]
    if not updated and any("ppo/masked" in line for line in lines):
        return [_unchanged(lines)]
    looks = {_cut: lines} | dict.fromkeys((_far, _narrow, _clipped, _exploited, _flat), updated)
    return [told for look, seen in looks.items()
            if len(seen) >= LEAST_ITERATIONS and (told := look(seen))]


def signs_of_run(folder: str | Path) -> list[str]:
    """Reads the signs of trouble of the PPO run in `folder`, [] where it has no metrics."""
    path = Path(folder) / "metrics.jsonl"
    return signs([json.loads(line) for line in path.read_text().splitlines()]
                 if path.exists() else [])


def _unchanged(lines: Sequence[dict]) -> str:
    # every response was cut, so each has the longest length
    return (f"no response ended within --max-new-tokens {lines[-1]['rollout/length']:.0f} in any "
            "iteration, so the policy was not changed; raise it")


def _cut(lines: Sequence[dict]) -> str | None:
    last = lines[-LEAST_ITERATIONS:]
    share = sum(line.get("rollout/truncated", 0.0) for line in last) / len(last)
    if share <= TRUNCATED:
        return None
    return (f"{100 * share:.0f}% of the responses in the last {len(last)} iterations were cut at "
            "--max-new-tokens before they ended; raise it, or give --missing-eos-penalty")


def _far(lines: Sequence[dict]) -> str | None:
    worst = max(lines, key=lambda line: line["rollout/kl_k1"])
    if worst["rollout/kl_k1"] <= KL_PER_TOKEN:
        return None
    return (f"the policy is far from the SFT policy, {worst['rollout/kl_k1']:.2g} nats per token "
            f"at iteration {worst['step']}; raise --beta or lower --lr")


def _narrow(lines: Sequence[dict]) -> str | None:
    first = lines[0]["ppo/entropy"]
    worst = min(lines, key=lambda line: line["ppo/entropy"])
    if worst["ppo/entropy"] >= ENTROPY_LEFT * first:
        return None
    return (f"the entropy fell from {first:.2g} to {worst['ppo/entropy']:.2g} nats per token at "
            f"iteration {worst['step']}, so the policy repeats itself; raise --beta, lower --lr or "
            "take fewer --iterations")


def _clipped(lines: Sequence[dict]) -> str | None:
    found = [line["step"] for line in lines if line["ppo/clip_fraction"] > CLIP_FRACTION]
    if len(found) < CLIPPED_ITERATIONS:
        return None
    return (f"over {100 * CLIP_FRACTION:.0f}% of the tokens were clipped in {len(found)} of "
            f"{len(lines)} iterations; lower --lr or --epochs, or give --max-kl 0.1")


def _exploited(lines: Sequence[dict]) -> str | None:
    judged = [line for line in lines if "eval/win_rate" in line]
    if not judged:
        return None
    best, last = max(judged, key=lambda line: line["eval/win_rate"]), judged[-1]
    lost = best["eval/win_rate"] - last["eval/win_rate"]
    if lost <= WIN_RATE_LOST or last["rollout/reward"] <= best["rollout/reward"]:
        return None
    return (f"from iteration {best['step']} to {last['step']} the reward rose from "
            f"{best['rollout/reward']:.3g} to {last['rollout/reward']:.3g} while the dev win rate "
            f"fell from {100 * best['eval/win_rate']:.0f}% to {100 * last['eval/win_rate']:.0f}%, "
            "so the policy exploits the reward model; use OUT/best, raise --beta, or annotate "
            "answers of this policy")


def _flat(lines: Sequence[dict]) -> str | None:
    rates = [line["eval/win_rate"] for line in lines if "eval/win_rate" in line]
    if not rates or max(rates) > FLAT_WIN_RATE:
        return None
    return (f"the dev win rate stayed at or below {100 * max(rates):.0f}%, as it does without "
            "learning; look at the reward model first (eval.py reward-model), then raise --lr or "
            "lower --beta")
