r"""Collects preferences, and minimal edits of the less preferred responses (paper, section 2.1).

    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor human
    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor llm --model NAME
    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor llm --model NAME \
        --api openai --base-url http://127.0.0.1:8000/v1 --dry-run
    python -m fgrlhf.collect --pairs pairs.jsonl --out edits.jsonl --editor simulated --world 0
    python -m fgrlhf.collect --outputs A.json --reference B.json --out pairs.jsonl \
        --editor human --ask preference
    python -m fgrlhf.collect --report edits.jsonl
    python -m fgrlhf.collect --report edits.jsonl others.jsonl

The editor is a person in the browser, a language model, or the editor of the built-in world.
--pairs is a file of preferences in any format that the project reads; --out is a file of edits for
train_rm.py. The same command continues a collection that was stopped, and does no record twice,
even if the lines of --pairs have moved. It refuses if a finished record has another response now,
or is by a simulated editor of other flags.
--ask preference shows people two answers to each prompt, side by side and blind, and writes pairs
for train_rm.py. --ask both then lets them edit the worse answer, and writes pairs and edits.
--report describes the edits of one file, or compares the edits of two annotators.

The exit status is 0, or 1 if a language model left records unanswered: start the command again to
ask for them. After Ctrl-C the status is 130; only the page for people ends with 0.
"""

import random
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from fgrlhf.collect import client, human, llm, preferences, summary
from fgrlhf.collect.actions import Actions
from fgrlhf.collect.agreement import report
from fgrlhf.collect.cache import Cache
from fgrlhf.collect.change import FREE_WORDS
from fgrlhf.collect.desk import Desk, drafts_path, read_drafts
from fgrlhf.collect.resume import resumed
from fgrlhf.collect.store import Skip, Store, path_beside, recorded
from fgrlhf.collect.tasks import Answer, Task, read_tasks
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Edit, Provenance
from fgrlhf.engine.config import arg, parse, refuse_unused, run
from fgrlhf.simulate.annotators import minimal_edit
from fgrlhf.simulate.origin import check_requests
from fgrlhf.simulate.world import World, world_arg


ASK = ("edit", "preference", "both")


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The built-in world as editor (--editor simulated)"""

    world: int | str | None = world_arg("seed of the world that the pairs come from", None)
    seed: int = arg(0, help="seed of the editor's random choices, and of the order in which people "
                            "see two answers")
    miss: float = arg(0.0, least=0, most=1, help="probability that the editor misses an error")
    needless: float = arg(0.0, least=0, most=1, help="probability that the editor also rewords a "
                          "sentence that needs no change")


@dataclass(frozen=True, kw_only=True)
class Config(client.Options, human.Options, Simulation):
    pairs: str | None = arg(None, help="preferences (or edits); their less preferred responses are "
                                       "edited")
    out: str = arg(help="file to write or to continue: of edits, or of pairs with --ask preference")
    editor: str = arg(choices=("simulated", "llm", "human"), help="who edits")
    ask: str = arg("edit", choices=ASK, help="what people are asked for: edits of --pairs, "
                                             "preferences between --outputs and --reference, or a "
                                             "preference and then the edit of the worse answer")
    outputs: str | None = arg(None, help="preference, both: a system's answers, in the format of "
                                         "eval.py outputs")
    reference: str | None = arg(None, help="preference, both: other answers to the same prompts")
    limit: int | None = arg(None, least=1, help="take only the first N preferences or prompts")
    max_change: float = arg(0.5, least=0, help="largest share of words that a person or a language "
                                               "model may change")
    free_words: int = arg(FREE_WORDS, least=0, help="number of words that they may always change, "
                                                    "because few words are a large share of a "
                                                    "short response")
    dry_run: bool = arg(False, help="show what would be edited or sent, and write nothing")


# The flags that each editor uses, of those that not every editor uses.
USED = {"simulated": [field.name for field in fields(Simulation)],
        "llm": [*(field.name for field in fields(client.Options)), "max_change", "free_words"],
        "human": [*(field.name for field in fields(human.Options)), "max_change", "free_words",
                  "seed"]}


def simulated(options: Simulation, tasks: list[Task], pairs: str) -> Callable[[Task], Answer]:
    """Returns the built-in world's minimal editor.

    Its random choices depend only on the seeds and the record's id, not on the order of the
    records. Raises UserError without --world, or for a task that does not come from that world.
    `pairs` is the file of the tasks, to name in the message.
    """
    if options.world is None:
        raise UserError("--editor simulated: expected --world too, the seed of the world that the "
                        "pairs come from")
    world = World(options.world)
    check_requests(world, tasks, pairs)

    def edit(task: Task) -> Answer:
        rng = random.Random(f"collect-{world.seed}-{options.seed}-{task.id}")
        text = minimal_edit(world, task.prompt, task.rejected, rng, options.miss, options.needless)
        return Answer(text) if text else Answer(None, "nothing is left of the response")

    return edit


def settings_of(options: Simulation) -> str:
    """Returns the flags that decide the edits of the simulated editor; its records keep them."""
    world = World(options.world).name.removeprefix("world ")
    return (f"--world {world} --seed {options.seed} --miss {options.miss} "
            f"--needless {options.needless}")


def check_settings(records: Iterable[Edit | Skip], settings: str, out: str) -> None:
    """Raises UserError if the simulated editor of an earlier record had other settings.

    The records of older versions do not name the settings, and are not compared.
    """
    for record in records:
        how = record.provenance
        if how and how.editor == "simulated" and how.model not in (None, settings):
            raise UserError(f"{out}: record {record.id!r}: expected the simulated editor that made "
                            f"it, {how.model}, got {settings}; give the same flags again, or "
                            "choose another --out")


def record_of(task: Task, answer: Answer, seconds: float, editor: str, model: str,
              prompt_version: str | None = None) -> Edit | Skip:
    """Builds the record to write: an Edit, or a Skip if the answer has no usable text.

    model: the name of a language model, or the settings of the simulated editor.
    """
    annotator = editor if editor == "simulated" else model
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    how = Provenance(editor, now, answer.attempts, round(seconds, 3), model, prompt_version)
    if answer.text is None:
        return task.skip("refused", answer.reason, annotator, how)
    return task.edit(answer.text, annotator, how)


def timed(edit: Callable[[Task], Answer]) -> Callable[[Task], tuple[Answer, float]]:
    """Wraps an editor: returns (its answer, the seconds it took)."""
    def call(task: Task) -> tuple[Answer, float]:
        start = time.perf_counter()
        return edit(task), time.perf_counter() - start
    return call


def by_simulation(tasks: list[Task], store: Store, edit: Callable[[Task], Answer],
                  settings: str) -> None:
    """Edits every task that has no record yet, one after another."""
    for task in tqdm(store.remaining(tasks), desc="edit"):
        store.add(record_of(task, *timed(edit)(task), "simulated", settings))


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


def by_people(tasks: list[Task], store: Store, config: Config) -> None:
    """Serves the page on which people edit every task that has no record yet."""
    desk = Desk(tasks, store, config.max_change, free_words=config.free_words)
    largest = human.largest_message(task.rejected for task in tasks)
    human.serve(Actions(desk, None, config.annotator, largest), store.path, config)


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
    refuse_unused(config, "editor", USED)
    if not 0 < config.max_change <= 1:
        raise UserError(f"--max-change {config.max_change}: expected a share above 0, up to 1")
    human.public_address(config)                     # refuses a bad URL before a file is made
    return edit(config) if config.ask == "edit" else ask_people(config)


def ask_people(config: Config) -> int:
    """Collects preferences, with --ask both edits too. Returns the exit status 0."""
    preferences.check_flags(config)
    tasks = preferences.read_comparisons(config.outputs, config.reference, config.limit,
                                         config.seed)
    if config.dry_run:
        print(f"{len(tasks)} pairs to judge, before leaving out those judged already")
    else:
        preferences.collect(tasks, config)
    return 0


def edit(config: Config) -> int:
    """Collects edits of the less preferred responses of --pairs. Returns the exit status."""
    if config.pairs is None or config.outputs or config.reference:
        raise UserError("--ask edit: expected --pairs, and neither --outputs nor --reference; give "
                        "a file of preferences, or choose --ask preference or --ask both")
    if Path(config.out).resolve() == Path(config.pairs).resolve():
        raise UserError(f"--out {config.out}: expected another file than --pairs, got the same; "
                        "choose another --out")
    tasks = read_tasks(config.pairs, config.limit)
    if config.dry_run:
        print(dry_run(config, tasks))
        return 0
    # These two refuse bad flags here, before a file is made.
    asking = client.Client(config) if config.editor == "llm" else None
    edit_one = simulated(config, tasks, config.pairs) if config.editor == "simulated" else None
    status = 0
    with Store(config.out) as store:
        drafts = read_drafts(drafts_path(store.path)) if config.editor == "human" else []
        tasks = resumed(tasks, [*store.records.values(), *drafts], store.path, config.pairs)
        if edit_one:
            check_settings(store.records.values(), settings_of(config), config.out)
        try:
            if asking:
                done = by_llm(tasks, store, asking, config.max_change, config.free_words)
                status = 0 if done else 1
            elif edit_one:
                by_simulation(tasks, store, edit_one, settings_of(config))
            else:
                by_people(tasks, store, config)
        except KeyboardInterrupt:
            print("stopped; start again to continue")
            status = 130
        print(summary.edited(tasks, store))
    return status


if __name__ == "__main__":
    if sys.argv[1:2] == ["--report"]:
        run(lambda: print(report(sys.argv[2:])))
    else:
        run(lambda: sys.exit(main(parse(Config, __doc__))))
