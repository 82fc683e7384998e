"""People compare two answers to each prompt, and may edit the worse one (--ask preference, both).

    --ask preference --out PAIRS.jsonl      PAIRS.judgements.jsonl, and from it PAIRS.jsonl
    --ask both --out EDITS.jsonl            EDITS.jsonl, EDITS.judgements.jsonl, EDITS.pairs.jsonl
"""

import sys
from contextlib import ExitStack
from pathlib import Path

from fgrlhf.collect import human, jury, summary
from fgrlhf.collect.actions import Actions
from fgrlhf.collect.desk import Desk
from fgrlhf.collect.judgements import (
    Comparison, Judgement, Judgements, check_resumed, comparisons)
from fgrlhf.collect.judging import JudgeDesk
from fgrlhf.collect.resume import resumed
from fgrlhf.collect.store import Store, path_beside
from fgrlhf.data.fields import UserError
from fgrlhf.data.outputs import joined
from fgrlhf.data.readers import read_outputs


def read_comparisons(outputs: str, reference: str, limit: int | None, seed: int
                     ) -> list[Comparison]:
    """Reads two files of answers and joins them by prompt; returns pairs of the first `limit`
    prompts. What holds no preference is left out, and counted on stderr.
    """
    theirs = read_outputs(reference)
    ours = joined(read_outputs(outputs), theirs, (outputs, reference))
    ours, theirs = ours[:limit], theirs[:limit]
    different = comparisons(ours, theirs, seed)
    tasks = [task for task in different if all(text.strip() for text in task.outputs)]
    for count, reason in ((len(theirs) - len(different), "the two answers are equal"),
                          (len(different) - len(tasks), "an answer is blank")):
        if count:
            print(f"{count} of {len(theirs)} pairs left out: {reason}", file=sys.stderr)
    return tasks


def collect(tasks: list[Comparison], config) -> None:
    """Serves the page for --ask preference or both, and prints a summary at its end."""
    both = config.ask == "both"
    out = Path(config.out).resolve()
    pairs, judged = path_beside(out, "pairs") if both else out, path_beside(out, "judgements")
    with ExitStack() as files:
        store = files.enter_context(Judgements(judged, pairs))
        check_resumed(tasks, store)
        edits = files.enter_context(Store(out)) if both else None
        desk = edit_desk(tasks, store, edits, config) if both else None
        texts = [text for task in tasks for text in task.outputs]
        human.serve(Actions(desk, JudgeDesk(tasks, store), config.annotator,
                            human.largest_message(texts)), out, config)
        print(summary.judged(jury.figures(tasks, store), store.path))
        if desk:
            print(summary.edited(list(desk.tasks.values()), edits))


def edit_desk(tasks: list[Comparison], store: Judgements, edits: Store, config) -> Desk:
    """Returns the desk with the worse answers of all pairs that are judged already."""
    judged = [record for task in tasks
              if isinstance(record := store.records.get(task.id), Judgement) and record.as_task()]
    worse = resumed([record.as_task() for record in judged], edits.records.values(), edits.path,
                    config.outputs)
    desk = Desk(worse, edits, config.max_change, free_words=config.free_words)
    for record in judged:
        desk.add(record.as_task(), record.annotator)
    return desk


def check_flags(config) -> None:
    """Raises UserError for flags that do not go together."""
    if config.editor != "human":
        raise UserError(f"--ask {config.ask}: expected --editor human, got --editor "
                        f"{config.editor}; a language model judges with eval.py win-rate "
                        "--judge llm")
    if config.outputs is None or config.reference is None or config.pairs is not None:
        raise UserError(f"--ask {config.ask}: expected --outputs and --reference, and not --pairs; "
                        "give two files of answers to the same prompts")
    for name in ("outputs", "reference"):
        if Path(config.out).resolve() == Path(getattr(config, name)).resolve():
            raise UserError(f"--out {config.out}: expected another file than --{name}, got the "
                            "same; choose another --out")
