"""Trains the linear probes of several seeds, and measures what a single probe does not tell.

    python -m fgrlhf.real.probes --data train-edits.jsonl --eval-edits val-edits.jsonl \
        --published defacto/val.jsonl --model MODEL --hidden-states states.pt --out probes.json

A probe is that of train_rm.py --freeze, number for number, but no model is written. OUT has for
each of LOSSES the list over seeds of

    pairs_mean, pairs_sum           the edit has the higher R, where R is the mean or the sum of r_t
    equal_mean, equal_sum           the same where the sides differ by at most one token in length
    without_ends, equal_without_ends    pairs by the loss's own R, trained and judged without the
                                    final full stop and EOS of both sides (--hide ends); not with
                                    --twice, where that would be another pass over all responses
    auc_within, auc                 -r_t of the tokens that the editor took out against the others,
                                    within a summary and pooled
    detects_lowest, detects_mean    AUC of "the annotator found an error", by the lowest and by the
                                    mean r_t of all candidates in --published
    calibration_error               see `reliability`

and, of the margins of all seeds together, the table of `reliability`.

--folds K takes the held-out edits from --data instead: each of K folds is judged by a probe that is
trained on the others, and the seed also draws the folds. Settings are chosen this way.

--twice lets a probe read each response twice (Springer et al. 2024, arXiv 2402.15449): the prompt,
the response, and the response again, whose hidden states the probe reads. There a causal model has
seen what follows a token. PPO would need the same of its reward model, and does not have it.
"""

import json
import sys
from dataclasses import dataclass

import numpy as np
import torch

from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import write_atomic
from fgrlhf.encode import Encoder, PreferenceIds, read_encoded
from fgrlhf.engine.config import Computation, arg, parse, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.engine.draws import bucketed_batches, generator
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.evaluate import Judged, auc, reward_table
from fgrlhf.frozen import FrozenStates
from fgrlhf.model import LLaMA
from fgrlhf.real.analysis import Candidate, read_candidates
from fgrlhf.real.prompts import prompt_arg
from fgrlhf.reward import PreferenceBatch, RewardModel, judge_preferences, token_loss
from fgrlhf.sequences import pack
from kernels.token_preference import Options

ANCHORED, KEPT = (Options("sum", u0, weight, 1.0) for u0, weight in (("anchor", 0.02), ("kept", 1)))
# The options, which R the loss compares, and the epochs, as stages.py has them for train_rm.py.
LOSSES = {"paper": (Options("response"), "mean", 6), "ours": (ANCHORED, "sum", 20),
          "kept": (KEPT, "sum", 20)}
BATCH, LR, WARMUP = 16, 3e-3, 10            # the defaults of train_rm.py
BINS = 5


@dataclass(frozen=True, kw_only=True)
class Config(Computation):
    data: str = arg(help="edits to train on")
    model: str = arg(help="the pretrained model")
    out: str = arg(help="file for the figures")
    eval_edits: str | None = arg(None, help="held-out edits; without them --folds")
    published: str | None = arg(None, help="DeFacto's file of the held-out summaries")
    layer: int = arg(20, least=1, help="the probe reads the hidden states behind the first N "
                     "blocks")
    hidden_states: str | None = arg(None, help="a file that keeps the hidden states, as that of "
                                    "train_rm.py")
    twice: bool = arg(False, help="read each response twice, so that a token sees what follows it")
    losses: str = arg("paper,ours", help=f"some of {', '.join(LOSSES)}, with commas between them")
    seeds: int = arg(5, least=1, help="number of probes of each loss")
    folds: int = arg(0, least=0, help="judge the folds of --data in place of --eval-edits")
    prompt: str = prompt_arg("with --published: ")


class TwiceRead(FrozenStates):
    """Keeps the hidden states of the second of two copies of a response.

    between: the ids between the copies, those of the template without a prompt.
    """

    def __init__(self, trunk: LLaMA, layer: int, between: list[int], eos: int):
        super().__init__(trunk, layer)
        self.between, self.eos = between, eos

    def before(self, prompt: list[int], response: list[int]) -> list[int]:
        first = response[:-1] if response[-1] == self.eos else response
        return [*prompt, *first, *self.between]

    @property
    def reading(self) -> str:
        return "twice"


# ----- probes -------------------------------------------------------------------------------------

def train_probe(states: FrozenStates, examples: list[PreferenceIds], loss: str,
                seed: int) -> RewardModel:
    """Trains a token-level probe on hidden states that `states` keeps."""
    options, response, epochs = LOSSES[loss]
    torch.manual_seed(seed)                                 # the head's initialisation
    model = RewardModel(states.trunk.requires_grad_(False), "token", response, layer=states.layer)
    model.frozen = states
    lengths = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in examples]
    steps = epochs * -(-len(examples) // BATCH)
    optimizer = Optimizer(model, LR, WARMUP, steps)
    for epoch in range(epochs):
        for rows in bucketed_batches(lengths, BATCH, seed, epoch):
            batch = PreferenceBatch.of([examples[i] for i in rows], model.device)
            token_loss(model, batch, options).loss.backward()
            optimizer.step()
    return model


def held_out(states: FrozenStates, edits: tuple[list, list], others: tuple[list, list] | None,
             loss: str, seed: int, folds: int, tokenizer) -> tuple[list[Judged], RewardModel]:
    """Judges `others` by a probe that is trained on `edits`, or without others the folds of these.

    edits, others: records and their ids. Returns the judgements and the last probe.
    """
    records, examples = edits
    if others is not None:
        model = train_probe(states, examples, loss, seed)
        return judge_preferences(model, *others, tokenizer), model
    judged, order = [], torch.randperm(len(records), generator=generator(seed, "folds")).tolist()
    for k in range(folds):
        out = set(order[k::folds])
        model = train_probe(states, [p for i, p in enumerate(examples) if i not in out], loss, seed)
        judged += judge_preferences(model, [records[i] for i in order[k::folds]],
                                    [examples[i] for i in order[k::folds]], tokenizer)
    return judged, model


# ----- figures ------------------------------------------------------------------------------------

def reliability(margins: list[float], bins: int = BINS) -> tuple[float, list[dict]]:
    """Returns the expected calibration error, and its table of bins without the empty ones.

        P = sigmoid(|R+ - R-|)      in [1/2, 1], how sure the model is of the side that it prefers
        right                       1 where that side is the edit, 1/2 for a tie
        error = sum_bins n_bin / n |mean P - mean right|        Guo et al. 2017, arXiv 1706.04599

    margins: R+ - R- of each pair. The bins divide [1/2, 1] into equal parts.
    """
    values = np.asarray(margins, dtype=float)
    P, right = 1 / (1 + np.exp(-np.abs(values))), (np.sign(values) + 1) / 2
    place = np.minimum(((P - 0.5) * 2 * bins).astype(int), bins - 1)
    table = [{"pairs": int(some.sum()), "P": float(P[some].mean()),
              "right": float(right[some].mean())}
             for some in (place == k for k in range(bins)) if some.any()]
    return sum(row["pairs"] * abs(row["P"] - row["right"]) for row in table) / len(values), table


def margins_of(judged: list[Judged]) -> list[float]:
    return [j.chosen - j.rejected for j in judged]


def figures_of(judged: list[Judged]) -> dict[str, float]:
    """Returns the figures of held-out edits, named as in the docstring of this module."""
    table, response = reward_table(judged), judged[0].response
    other = "pair_accuracy_sum" if response == "mean" else "pair_accuracy_per_token"
    names = {"mean": "pair_accuracy", "sum": other} if response == "mean" else {
        "mean": other, "sum": "pair_accuracy"}
    found = {f"{name}_{how}": table.get(prefix + names[how]) for how in ("mean", "sum")
             for name, prefix in (("pairs", ""), ("equal", "equal_length/"))}
    return found | {"auc_within": table.get("edit_auc_within"), "auc": table.get("edit_auc"),
                    "calibration_error": reliability(margins_of(judged))[0]}


@torch.no_grad()
def detection(model: RewardModel, candidates: list[Candidate]) -> dict[str, float]:
    """Returns the AUC of "the annotator found an error" by the rewards, EOS left out."""
    rewards = [model.token_rewards(pack([one.ids.prompt], [one.ids.rejected]))[0, :-1]
               for one in candidates]
    wrong = [one.label.has_error for one in candidates]
    return {"detects_lowest": auc([-r.min().item() for r in rewards], wrong),
            "detects_mean": auc([-r.mean().item() for r in rewards], wrong)}


def kept_states(config: Config, trunk: LLaMA, tokenizer,
                examples: list[PreferenceIds]) -> FrozenStates:
    """Returns the hidden states of all examples, from the file as far as it has them."""
    between = tokenizer.encode(" ->")                       # of the template "plain"
    states = TwiceRead(trunk, config.layer, between, tokenizer.eos_id) if config.twice else \
        FrozenStates(trunk, config.layer)
    states.add_with_file(examples, config.hidden_states)
    return states


def without_ends(states: FrozenStates, examples: list[PreferenceIds]) -> None:
    """Keeps the hidden states of responses without their ends, from those of whole responses.

    A causal model computes the same for them, except where the cut changes how a text is tokenised.
    """
    whole = {key[:-n]: piece[:-n] for key, piece in states.kept.items() for n in (1, 2)}
    wanted = {(len(p.prompt), *p.prompt, *side)
              for p in examples for side in (p.chosen, p.rejected)}
    states.kept |= {key: whole[key] for key in wanted - states.kept.keys() if key in whole}
    states.add(examples)


def check_flags(config: Config) -> list[str]:
    """Returns the losses. Raises UserError for flags that do not go together."""
    losses = config.losses.split(",")
    if unknown := set(losses) - set(LOSSES):
        raise UserError(f"--losses: expected some of {', '.join(LOSSES)}, got "
                        f"{', '.join(sorted(unknown))}")
    if (config.eval_edits is None) == (config.folds < 2) or (config.folds and config.published):
        raise UserError("--eval-edits and --folds: expected one of them, folds from 2, and "
                        "--published only with --eval-edits")
    return losses


def probe(config: Config) -> None:
    losses, device = check_flags(config), pick_device(config.device)
    tokenizer = load_tokenizer(config.model)
    trunk = load_model(config.model, device, getattr(torch, config.dtype))
    encoders = {hide: Encoder(tokenizer, trunk.config.max_seq_len, "plain", hide=hide)
                for hide in ("nothing", "ends")}
    read = lambda path, hide: read_encoded(path, encoders[hide], False, None, "stop") \
        if path else None
    whole, cut = ((read(config.data, hide), read(config.eval_edits, hide)) for hide in encoders)
    every = lambda pair: [ids for edits in pair if edits for ids in edits[1]]
    states = kept_states(config, trunk, tokenizer, every(whole))
    if not config.twice:
        without_ends(states, every(cut))
    candidates = read_candidates(config.published, encoders["nothing"], config.prompt) \
        if config.published else []
    states.add([one.ids for one in candidates])

    result = {}
    for loss in losses:
        seeds, margins = [], []
        for seed in range(config.seeds):
            judged, model = held_out(states, *whole, loss, seed, config.folds, tokenizer)
            seeds.append(figures_of(judged))
            if not config.twice:
                blind = figures_of(held_out(states, *cut, loss, seed, config.folds, tokenizer)[0])
                seeds[-1] |= {name: blind[f"{of}_{LOSSES[loss][1]}"] for name, of in
                              (("without_ends", "pairs"), ("equal_without_ends", "equal"))}
            if candidates:
                seeds[-1] |= detection(model, candidates)
            margins += margins_of(judged)
            print(f"{loss}, seed {seed}: {json.dumps(seeds[-1])}", file=sys.stderr)
        result[loss] = {name: [one[name] for one in seeds] for name in seeds[0]} | {
            "reliability": reliability(margins)[1]}
    write_atomic(config.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    run(lambda: probe(parse(Config, __doc__)))
