"""Collect minimal edits of the less preferred responses (paper, section 3.1: the data).

    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor simulated --world 0
    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor human

Reads preferences in any format of the readers and writes edits for train_rm.py. Stopped in any way
and started again it goes on where it was; no record is done twice (fgrlhf/collecting/store.py).
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fgrlhf.collecting import human
from fgrlhf.collecting.change import measure
from fgrlhf.collecting.store import OUTCOMES, Skip, Store
from fgrlhf.collecting.tasks import Task, read_tasks
from fgrlhf.config import UserError, arg, parse, run
from fgrlhf.edits import Edit, Provenance
from fgrlhf.simulate import minimal_edit
from fgrlhf.world import World


@dataclass(frozen=True)
class Config:
    pairs: str = arg(help="preferences (or edits) whose less preferred responses are to be edited")
    out: str = arg(help="EDITS.jsonl to write or to continue")
    editor: str = arg(choices=("simulated", "human"), help="who edits")
    limit: int | None = arg(None, least=1, help="the first N preferences only")
    max_change: float = arg(0.5, least=0, help="largest share of words an edit may change")
    dry_run: bool = arg(False, help="show what would be done and write nothing")
    world: int | None = arg(None, help="simulated: seed of the built-in world")
    seed: int = arg(0, help="simulated: seed of misses and needless edits")
    miss: float = arg(0.0, least=0, help="simulated: probability that it overlooks an error")
    needless: float = arg(0.0, least=0, help="simulated: probability of one swapped synonym")
    host: str = arg("127.0.0.1", help="human: interface of the page")
    port: int = arg(0, least=0, help="human: port of the page; 0 is any free one")
    allow_remote: bool = arg(False, help="human: let other machines in, with a --host for them")
    annotator: str | None = arg(None, help="human: who edits (default: the page asks)")


class Answer(NamedTuple):
    """What an editor made of a task."""

    text: str | None                              # None: no edit held up
    reason: str = ""                              # why there is none
    attempts: int = 1
    model: str | None = None
    prompt_version: str | None = None


Editor = Callable[[Task], Answer]


def simulated(config: Config) -> Editor:
    """The built-in world's minimal editor; each record has draws of its own, whatever the order."""
    if config.world is None:
        raise UserError("--editor simulated: expected --world beside it, the seed of the world "
                        "the pairs come from")
    world = World(config.world)

    def edit(task: Task) -> Answer:
        if not world.items(task.prompt):
            raise UserError(f"{config.pairs}: record {task.id!r}: {task.prompt[:60]!r} is no "
                            f"request of world {world.seed}; give the --world of the pairs")
        rng = random.Random(f"collect-{world.seed}-{config.seed}-{task.id}")
        text = minimal_edit(world, task.prompt, task.rejected, rng, config.miss, config.needless)
        return Answer(text) if text else Answer(None, "nothing is left of the response")

    return edit


def record_of(task: Task, answer: Answer, editor: str, seconds: float) -> Edit | Skip:
    """The line to write for an answer."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    provenance = Provenance(editor, now, answer.attempts, round(seconds, 3), answer.model,
                            answer.prompt_version)
    annotator = answer.model or editor
    if answer.text is None:
        return Skip(task.id, "refused", answer.reason, annotator, provenance)
    return task.edit(answer.text, annotator, provenance)


def collect(tasks: list[Task], editor: Editor, store: Store, name: str) -> None:
    """Ask the editor for each task that has no record yet."""
    for task in tqdm(store.remaining(tasks), desc="edit"):
        start = time.perf_counter()
        answer = editor(task)
        store.add(record_of(task, answer, name, time.perf_counter() - start))


def summary(tasks: list[Task], store: Store) -> str:
    """Outcomes, and a histogram of the share of changed words."""
    counts = store.counts()
    lines = [f"{len(tasks) - len(store.remaining(tasks))} of {len(tasks)} records done in "
             f"{store.path}: " + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES)]
    shares = [measure(r.original, r.edited).share for r in store.records.values()
              if isinstance(r, Edit) and r.original != r.edited]
    if shares:
        lines.append("share of changed words:")
        bins = [sum(low / 10 < share <= (low + 1) / 10 for share in shares) for low in range(10)]
        lines += [f"  to {low * 10 + 10:3d}% {count:6d}  {'#' * round(40 * count / max(bins))}"
                  for low, count in enumerate(bins)]
    return "\n".join(lines)


def main(config: Config) -> None:
    if not 0 < config.max_change <= 1:
        raise UserError(f"--max-change {config.max_change}: expected a share above 0, up to 1")
    if Path(config.out).resolve() == Path(config.pairs).resolve():
        raise UserError(f"--out {config.out}: expected another file than --pairs")
    tasks = read_tasks(config.pairs, config.limit)
    if config.dry_run:
        print(f"{len(tasks)} responses to edit; the first, of record {tasks[0].id!r}:\n"
              f"{tasks[0].rejected}")
        return
    with Store(config.out) as store:
        if config.editor == "human":
            options = human.Options(config.max_change, config.host, config.port,
                                    config.allow_remote, config.annotator)
            human.serve(tasks, store, options)
        else:
            collect(tasks, simulated(config), store, config.editor)
        print(summary(tasks, store))


if __name__ == "__main__":
    run(lambda: main(parse(Config, prog="fgrlhf.collect", description=__doc__)))
