"""Collect minimal edits of the less preferred responses (paper, section 3.1: the data).

    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor simulated --world 0
    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor human
    ANTHROPIC_API_KEY=... python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl \
        --editor llm --model NAME [--api openai --base-url http://127.0.0.1:8000/v1] [--dry-run]
    python -m fgrlhf.collect --report A.jsonl [B.jsonl]       how edits look, how two people agree

Reads preferences in any format of the readers and writes edits for train_rm.py. Stopped in any way
and started again it goes on where it was; no record is done twice (fgrlhf/collecting/store.py).
Exit status 0, or 1 where a language model left records unanswered: start again to ask for those.
"""

import random
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from fgrlhf.collecting import client, human, llm
from fgrlhf.collecting.agreement import report
from fgrlhf.collecting.cache import Cache
from fgrlhf.collecting.change import measure
from fgrlhf.collecting.store import OUTCOMES, Skip, Store, recorded
from fgrlhf.collecting.tasks import Answer, Task, read_tasks
from fgrlhf.config import UserError, arg, parse, run
from fgrlhf.edits import Edit, Provenance
from fgrlhf.simulate import minimal_edit
from fgrlhf.world import World


@dataclass(frozen=True)
class Config(client.Options):
    pairs: str = arg(help="preferences (or edits) whose less preferred responses are to be edited")
    out: str = arg(help="EDITS.jsonl to write or to continue")
    editor: str = arg(choices=("simulated", "llm", "human"), help="who edits")
    limit: int | None = arg(None, least=1, help="the first N preferences only")
    max_change: float = arg(0.5, least=0,
                            help="llm, human: largest share of words an edit may change")
    dry_run: bool = arg(False, help="show what would be asked, estimate it, write nothing")
    world: int | None = arg(None, help="simulated: seed of the built-in world")
    seed: int = arg(0, help="simulated: seed of misses and needless edits")
    miss: float = arg(0.0, least=0, help="simulated: probability that it overlooks an error")
    needless: float = arg(0.0, least=0, help="simulated: probability of one swapped synonym")
    host: str = arg("127.0.0.1", help="human: interface of the page")
    port: int = arg(0, least=0, help="human: port of the page; 0 chooses one")
    allow_remote: bool = arg(False, help="human: let other machines in, with a --host for them")
    annotator: str | None = arg(None, help="human: who edits (default: the page asks)")


def simulated(config: Config) -> Callable[[Task], Answer]:
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


def record_of(task: Task, answer: Answer, seconds: float, editor: str, model: str | None = None,
              prompt_version: str | None = None) -> Edit | Skip:
    """The line to write for an answer."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    how = Provenance(editor, now, answer.attempts, round(seconds, 3), model, prompt_version)
    if answer.text is None:
        return Skip(task.id, "refused", answer.reason, model or editor, how)
    return task.edit(answer.text, model or editor, how)


def timed(edit: Callable[[Task], Answer]) -> Callable[[Task], tuple[Answer, float]]:
    """The editor's answer and the seconds it took."""
    def call(task: Task) -> tuple[Answer, float]:
        start = time.perf_counter()
        return edit(task), time.perf_counter() - start
    return call


def by_simulation(tasks: list[Task], store: Store, edit: Callable[[Task], Answer]) -> None:
    """Every task that has no record yet, one after the other."""
    for task in tqdm(store.remaining(tasks), desc="edit"):
        store.add(record_of(task, *timed(edit)(task), "simulated"))


def by_llm(tasks: list[Task], store: Store, asking: client.Client, max_change: float) -> bool:
    """Likewise by a language model, several at once; False where one was left unanswered.

    Such a record is not written: the next run asks for it.
    """
    asking.cache = Cache(store.path.with_name(store.path.stem + ".cache.jsonl"))
    todo, problem = store.remaining(tasks), ""
    answers = asking.gather(todo, timed(llm.editor(asking, max_change)))
    with closing(asking.cache), closing(answers):         # answers first: they end in the cache
        for task, result in tqdm(answers, desc="edit", total=len(todo)):
            if isinstance(result, client.Unanswered):
                problem = f"record {task.id!r}: {result}"
            else:
                store.add(record_of(task, *result, "llm", asking.model, llm.EDIT_PROMPT))
    print(f"{asking.requests} requests sent, {asking.cached} answers from the cache")
    if asking.stopped_by:
        print(f"stopped: {asking.stopped_by}; start again to go on")
    if problem:
        print(f"left unanswered, for the next run; the last: {problem}")
    return not problem


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
        bins[0] += shares.count(0)                # where blanks alone were changed
        lines += [f"  to {low * 10 + 10:3d}% {count:6d}  {'#' * round(40 * count / max(bins))}"
                  for low, count in enumerate(bins)]
    return "\n".join(lines)


def main(config: Config) -> int:
    """The exit status: 0, 1 with unanswered records, 130 after Ctrl-C."""
    if not 0 < config.max_change <= 1:
        raise UserError(f"--max-change {config.max_change}: expected a share above 0, up to 1")
    if Path(config.out).resolve() == Path(config.pairs).resolve():
        raise UserError(f"--out {config.out}: expected another file than --pairs")
    tasks = read_tasks(config.pairs, config.limit)
    if config.dry_run:
        done = recorded(Path(config.out))
        todo = [task for task in tasks if task.id not in done]
        print(llm.preview(config, todo) if config.editor == "llm" else
              "\n".join([f"{len(todo)} responses to edit", *(task.rejected for task in todo[:2])]))
        return 0
    asking = client.Client(config) if config.editor == "llm" else None     # refuse before a file
    edit = simulated(config) if config.editor == "simulated" else None     # is made
    status = 0
    with Store(config.out) as store:
        try:
            if asking:
                status = 0 if by_llm(tasks, store, asking, config.max_change) else 1
            elif edit:
                by_simulation(tasks, store, edit)
            else:
                human.serve(tasks, store, human.Options(
                    config.max_change, config.host, config.port, config.allow_remote,
                    config.annotator))
        except KeyboardInterrupt:
            print("stopped; start again to go on")
            status = 130
        print(summary(tasks, store))
    return status


if __name__ == "__main__":
    if sys.argv[1:2] == ["--report"]:
        run(lambda: print(report(sys.argv[2:])))
    else:
        run(lambda: sys.exit(main(parse(Config, prog="fgrlhf.collect", description=__doc__))))
