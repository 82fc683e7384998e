r"""Collects minimal edits of the less preferred responses (paper, section 2.1).

    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor human
    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor llm --model NAME
    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor llm --model NAME \
        --api openai --base-url http://127.0.0.1:8000/v1 --dry-run
    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor simulated --world 0
    python -m fgrlhf.collect --report edits.jsonl
    python -m fgrlhf.collect --report edits.jsonl others.jsonl

The editor is a person in the browser, a language model, or the editor of the built-in world.
--pairs is a file of preferences in any format that the project reads; --out is a file of edits for
train_rm.py. The same command continues a collection that was stopped, and does no record twice,
even if the lines of --pairs have moved. It refuses if a finished record has another response now.
--report describes the edits of one file, or compares the edits of two annotators.

The exit status is 0, or 1 if a language model left records unanswered: start the command again to
ask for them. After Ctrl-C the status is 130; only the page for people ends with 0.
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

from fgrlhf.collect import client, human, llm
from fgrlhf.collect.agreement import report
from fgrlhf.collect.cache import Cache
from fgrlhf.collect.change import FREE_WORDS, measure
from fgrlhf.collect.desk import drafts_path, read_drafts
from fgrlhf.collect.resume import resumed
from fgrlhf.collect.store import OUTCOMES, Skip, Store, path_beside, recorded
from fgrlhf.collect.tasks import Answer, Task, read_tasks
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Edit, Provenance
from fgrlhf.engine.config import arg, parse, run
from fgrlhf.simulate.annotators import minimal_edit
from fgrlhf.simulate.world import World, world_arg


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The built-in world as editor (--editor simulated)"""

    world: int | str | None = world_arg("seed of the world that the pairs come from", None)
    seed: int = arg(0, help="seed of the editor's random choices")
    miss: float = arg(0.0, least=0, help="probability that the editor misses an error")
    needless: float = arg(0.0, least=0, help="probability that the editor also rewords a sentence "
                                             "that needs no change")


@dataclass(frozen=True, kw_only=True)
class Config(client.Options, human.Options, Simulation):
    pairs: str = arg(help="preferences (or edits); their less preferred responses are edited")
    out: str = arg(help="file of edits to write or to continue")
    editor: str = arg(choices=("simulated", "llm", "human"), help="who edits")
    limit: int | None = arg(None, least=1, help="edit only the first N preferences")
    max_change: float = arg(0.5, least=0, help="largest share of words that a person or a language "
                                               "model may change")
    free_words: int = arg(FREE_WORDS, least=0, help="number of words that they may always change, "
                                                    "because few words are a large share of a "
                                                    "short response")
    dry_run: bool = arg(False, help="show what would be edited or sent, and write nothing")


def simulated(options: Simulation, pairs: str) -> Callable[[Task], Answer]:
    """Returns the built-in world's minimal editor.

    Its random choices depend only on the seeds and the record's id, not on the order of the
    records. Raises UserError without --world, or for a prompt that does not come from that world.
    `pairs` is the file to name in the message.
    """
    if options.world is None:
        raise UserError("--editor simulated: expected --world too, the seed of the world that the "
                        "pairs come from")
    world = World(options.world)

    def edit(task: Task) -> Answer:
        if not world.items(task.prompt):
            raise UserError(f"{pairs}: record {task.id!r}: expected a request of world "
                            f"{world.spec}, got {task.prompt[:60]!r}; give the --world of the "
                            "pairs")
        rng = random.Random(f"collect-{world.seed}-{options.seed}-{task.id}")
        text = minimal_edit(world, task.prompt, task.rejected, rng, options.miss, options.needless)
        return Answer(text) if text else Answer(None, "nothing is left of the response")

    return edit


def record_of(task: Task, answer: Answer, seconds: float, editor: str, model: str | None = None,
              prompt_version: str | None = None) -> Edit | Skip:
    """Builds the record to write: an Edit, or a Skip if the answer has no usable text."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    how = Provenance(editor, now, answer.attempts, round(seconds, 3), model, prompt_version)
    if answer.text is None:
        return task.skip("refused", answer.reason, model or editor, how)
    return task.edit(answer.text, model or editor, how)


def timed(edit: Callable[[Task], Answer]) -> Callable[[Task], tuple[Answer, float]]:
    """Wraps an editor: returns (its answer, the seconds it took)."""
    def call(task: Task) -> tuple[Answer, float]:
        start = time.perf_counter()
        return edit(task), time.perf_counter() - start
    return call


def by_simulation(tasks: list[Task], store: Store, edit: Callable[[Task], Answer]) -> None:
    """Edits every task that has no record yet, one after another."""
    for task in tqdm(store.remaining(tasks), desc="edit"):
        store.add(record_of(task, *timed(edit)(task), "simulated"))


def by_llm(tasks: list[Task], store: Store, asking: client.Client, max_change: float,
           free_words: int) -> bool:
    """Has a language model edit every task that has no record yet, several at once.

    Returns False if a question failed. Such a task gets no record, so the next run asks again.
    """
    asking.cache = Cache(path_beside(store.path, "cache"))
    todo, problem = store.remaining(tasks), ""
    answers = asking.gather(todo, timed(llm.editor(asking, max_change, free_words)))
    with closing(asking.cache), closing(answers):    # answers close first: they fill the cache
        for task, result in tqdm(answers, desc="edit", total=len(todo)):
            if isinstance(result, client.Unanswered):
                problem = f"record {task.id!r}: {result}"
            else:
                store.add(record_of(task, *result, "llm", asking.model, llm.EDIT_PROMPT))
    print(f"{asking.requests} requests sent, {asking.cached} answers from the cache")
    if asking.stopped_by:
        print(f"stopped: {asking.stopped_by}; start again to continue")
    if problem:
        print(f"some records are unanswered; start again to ask for them; the last: {problem}")
    return not problem


def summary(tasks: list[Task], store: Store) -> str:
    """Describes the outcomes, with a histogram of the share of changed words."""
    counts = store.counts()
    lines = [f"{len(tasks) - len(store.remaining(tasks))} of {len(tasks)} records done in "
             f"{store.path}: " + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES)]
    shares = [measure(r.original, r.edited).share for r in store.records.values()
              if isinstance(r, Edit) and r.original != r.edited]
    if shares:
        lines.append("share of changed words:")
        bins = [sum(low / 10 < share <= (low + 1) / 10 for share in shares) for low in range(10)]
        bins[0] += shares.count(0)                   # edits that change only marks or whitespace
        lines += [f"  to {low * 10 + 10:3d}% {count:6d}  {'#' * round(40 * count / max(bins))}"
                  for low, count in enumerate(bins)]
    return "\n".join(lines)


def dry_run(config: Config, tasks: list[Task]) -> str:
    """Describes what is still to do. Nothing is sent or written."""
    done = recorded(Path(config.out).resolve())
    tasks = resumed(tasks, done.values(), config.out, config.pairs)
    todo = [task for task in tasks if task.id not in done]
    if config.editor == "llm":
        return llm.preview(config, todo)
    return "\n".join([f"{len(todo)} responses to edit", *(task.rejected for task in todo[:2])])


def main(config: Config) -> int:
    """Collects the edits and returns the exit status: 0, 1 or 130, as the module says."""
    if not 0 < config.max_change <= 1:
        raise UserError(f"--max-change {config.max_change}: expected a share above 0, up to 1")
    if Path(config.out).resolve() == Path(config.pairs).resolve():
        raise UserError(f"--out {config.out}: expected another file than --pairs, got the same; "
                        "choose another --out")
    tasks = read_tasks(config.pairs, config.limit)
    if config.dry_run:
        print(dry_run(config, tasks))
        return 0
    # These three refuse bad flags here, before a file is made.
    asking = client.Client(config) if config.editor == "llm" else None
    edit = simulated(config, config.pairs) if config.editor == "simulated" else None
    human.public_address(config)
    status = 0
    with Store(config.out) as store:
        drafts = read_drafts(drafts_path(store.path)) if config.editor == "human" else []
        tasks = resumed(tasks, [*store.records.values(), *drafts], store.path, config.pairs)
        try:
            if asking:
                done = by_llm(tasks, store, asking, config.max_change, config.free_words)
                status = 0 if done else 1
            elif edit:
                by_simulation(tasks, store, edit)
            else:
                human.serve(tasks, store, config.max_change, config, config.free_words)
        except KeyboardInterrupt:
            print("stopped; start again to continue")
            status = 130
        print(summary(tasks, store))
    return status


if __name__ == "__main__":
    if sys.argv[1:2] == ["--report"]:
        run(lambda: print(report(sys.argv[2:])))
    else:
        run(lambda: sys.exit(main(parse(Config, __doc__))))
