"""The figures of a human evaluation: how people judged blind pairs of answers (paper, section 3.2).

    position bias   left / (left + right), ties left out; 1/2 without bias, because the order is
                    drawn. Its interval is Wilson's (1927)
    agreement       of two people over the pairs that both judged: the share of equal verdicts
                    (win, tie or loss), and Cohen's kappa (1960)
    seconds         the median time from showing a pair to the choice
"""

import math
import random
import statistics
import sys
from collections import defaultdict
from itertools import combinations

import numpy as np

from fgrlhf.collect import human
from fgrlhf.collect.actions import Actions
from fgrlhf.collect.agreement import cohen_kappa
from fgrlhf.collect.judgements import (
    Comparison, Judgement, Judgements, check_resumed, comparisons, for_judges, pair_ids)
from fgrlhf.collect.judging import JudgeDesk
from fgrlhf.data.records import Output
from fgrlhf.evaluate import Z_QUANTILE

DRAWS = 1000                                      # of the bootstrap over pairs


def by_people(config, system: list[Output], reference: list[Output]
              ) -> tuple[list[float | None], list[str], dict]:
    """People judge the pairs on the page, or continue (`python eval.py win-rate --judge human`).

    The pairs come in an order drawn with config.seed, so that those judged so far are a random
    sample. Returns one preference for the system per pair (None: not judged), the system's answers
    in the same order, and `figures`. Equal answers are a tie without a question, from the moment at
    which the people have come that far in the order: otherwise a run that is stopped early would
    have too many ties. Raises UserError if the judgements of earlier runs are about other answers.
    """
    n, ids = len(system), pair_ids(system, reference)
    order = random.Random(f"pairs-{config.seed}").sample(range(n), min(n, config.limit or n))
    place = {ids[i]: k for k, i in enumerate(order)}
    tasks = [task for task in comparisons(system, reference, config.seed) if task.pair in place]
    tasks = for_judges(sorted(tasks, key=lambda task: place[task.pair]), config.judges,
                       config.seed)
    with Judgements(config.judgements) as store:
        check_resumed(tasks, store)
        if equal := sum(system[i].output == reference[i].output for i in order):
            print(f"{equal} of {len(order)} pairs have equal answers: they count as ties and are "
                  "not shown", file=sys.stderr)
        if todo := len(store.remaining(tasks)):
            print(f"{todo} judgements to make; the figures so far are printed when you stop",
                  file=sys.stderr)
            human.serve(Actions(None, JudgeDesk(tasks, store), config.annotator), store.path,
                        config)
        else:
            print(f"all pairs are judged in {store.path}", file=sys.stderr)
        found = figures(tasks, store, config.seed)
        done = [task for task in tasks if task.id in store.records]
        known = pair_preferences([record for task in done
                                  if isinstance(record := store.records[task.id], Judgement)])
    places = {place[task.pair] for task in done}
    reached = n if len(places) == len({task.pair for task in tasks}) else max(places, default=-1)
    preferences = [known.get(ids[i]) if system[i].output != reference[i].output
                   else 0.5 if k <= reached else None for k, i in enumerate(order)]
    return preferences, [system[i].output for i in order], found


def wilson(count: int, n: int) -> tuple[float, float]:
    """Returns Wilson's 95% interval of a share count / n, for n >= 1. It stays inside [0, 1].

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """
    share, z2 = count / n, Z_QUANTILE ** 2
    centre = share + z2 / (2 * n)
    half = Z_QUANTILE * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def pair_preferences(judgements: list[Judgement]) -> dict[str, float]:
    """Returns {pair: the mean preference of its judges for output_2, in [0, 1]}."""
    verdicts = defaultdict(list)
    for judgement in judgements:
        verdicts[judgement.pair].append(judgement.preference - 1)
    return {pair: statistics.fmean(values) for pair, values in verdicts.items()}


def figures(tasks: list[Comparison], store: Judgements, seed: int = 0) -> dict:
    """Returns the figures about the judgements of `tasks`; see fgrlhf/engine/README.md."""
    ids = {task.id for task in tasks}
    judgements = [record for record in store.judged() if record.id in ids]
    skipped = sum(id in ids for id in store.records) - len(judgements)
    sides = [j.chosen_left for j in judgements if j.chosen_left is not None]
    times = [j.provenance.seconds for j in judgements if j.provenance]
    return {"judgements": len(judgements), "judged_ties": len(judgements) - len(sides),
            "skipped": skipped, "open": len(ids) - len(judgements) - skipped,
            "left_chosen": sum(sides) / len(sides) if sides else None,
            "left_chosen_95": list(wilson(sum(sides), len(sides))) if sides else None,
            "median_seconds": statistics.median(times) if times else None,
            "agreement": agreements(judgements, seed)}


def agreements(judgements: list[Judgement], seed: int = 0) -> list[dict]:
    """Returns the agreement of each two people who judged pairs in common.

    kappa_95 is the bootstrap's interval over these pairs. Draws without a kappa, because chance
    always agrees in them, are left out.
    """
    by_judge = defaultdict(dict)
    for judgement in judgements:
        by_judge[judgement.annotator or ""][judgement.pair] = judgement.preference
    found = []
    for one, other in combinations(sorted(by_judge), 2):
        pairs = [pair for pair in by_judge[one] if pair in by_judge[other]]
        if not pairs:
            continue
        both = np.array([[by_judge[name][pair] for name in (one, other)] for pair in pairs])
        rng, kappas = np.random.default_rng(seed), []
        for _ in range(DRAWS):
            drawn = both[rng.integers(0, len(pairs), len(pairs))]
            kappas.append(cohen_kappa(*drawn.T.tolist()))
        kappas = [kappa for kappa in kappas if kappa is not None]
        found.append({"judges": [one, other], "pairs": len(pairs),
                      "same": float((both[:, 0] == both[:, 1]).mean()),
                      "kappa": cohen_kappa(*both.T.tolist()),
                      "kappa_95": np.percentile(kappas, (2.5, 97.5)).tolist() if kappas else None})
    return found
