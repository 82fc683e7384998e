"""Writes the lines that a collection prints at its end."""

from collections import Counter

from fgrlhf.collect.agreement import number, percent
from fgrlhf.collect.change import measure
from fgrlhf.collect.store import OUTCOMES, Store, outcome_of
from fgrlhf.data.records import Edit


def edited(tasks: list, store: Store) -> str:
    """Describes the outcomes of the tasks, with a histogram of the share of changed words.

    The records of other tasks, from calls with other pairs or a larger limit, are only counted.
    """
    done = [store.records[task.id] for task in tasks if task.id in store.records]
    counts, others = Counter(map(outcome_of, done)), len(store.records) - len(done)
    lines = [f"{len(done)} of {len(tasks)} records done in {store.path}: "
             + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES)
             + (f"; {others} other records are in the collection too" if others else "")]
    shares = [measure(r.original, r.edited).share for r in done
              if isinstance(r, Edit) and r.original != r.edited]
    if shares:
        lines.append("share of changed words:")
        bins = [sum(low / 10 < share <= (low + 1) / 10 for share in shares) for low in range(10)]
        bins[0] += shares.count(0)                   # edits that change only marks or whitespace
        lines += [f"  to {low * 10 + 10:3d}% {count:6d}  {'#' * round(40 * count / max(bins))}"
                  for low, count in enumerate(bins)]
    return "\n".join(lines)


def judged(figures: dict, path: object) -> str:
    """Describes the judgements of a collection: the figures of jury.figures."""
    f = figures
    lines = [f"{f['judgements']} judgements in {path}: {f['judgements'] - f['judged_ties']} "
             f"preferences, {f['judged_ties']} ties; {f['skipped']} skipped, {f['open']} open"]
    if f["left_chosen"] is not None:
        low, high = f["left_chosen_95"]
        lines.append(f"  {'the left answer was chosen':28}{percent(f['left_chosen'])} of the "
                     f"preferences (95% interval {percent(low)} to {percent(high)})")
    if f["median_seconds"] is not None:
        lines.append(f"  {'median time':28}{f['median_seconds']:.1f} s per judgement")
    lines += [f"  {' and '.join(a['judges']):28}{a['pairs']} pairs in common: {percent(a['same'])} "
              f"the same, kappa {number(a['kappa'])}" for a in f["agreement"]]
    return "\n".join(lines)
