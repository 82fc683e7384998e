"""Reads the tasks (one less preferred response each) and the instructions for the editors.

A record that has an id keeps it. A record without an id gets an id made from its content, not from
its line number. So it keeps its edit when the file gets other lines before it.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from fgrlhf.collect.store import Skip
from fgrlhf.data.readers import read_preferences
from fgrlhf.data.records import Edit, Pair, Passage, Provenance, Span

UNNAMED = "content-"                              # begins the id of a record that has none


@dataclass(frozen=True)
class Task:
    """One preference: `rejected` is to be edited, and the editor may see `chosen`."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    input: str | None = None
    context: tuple[Passage, ...] = ()
    spans: tuple[Span, ...] | None = None         # error spans of `rejected`; no editor sees them
    dataset: str | None = None

    @property
    def content(self) -> str:
        """The hash of what is edited, by which a resumed collection knows the task."""
        return content_of(self.prompt, self.input, self.context, self.rejected)

    @property
    def is_unnamed(self) -> bool:
        """True if the record has no id of its own."""
        return self.id.startswith(UNNAMED)

    def edit(self, text: str, annotator: str | None, provenance: Provenance) -> Edit:
        """Builds the record of this task edited to `text`. It keeps the spans, for evaluation."""
        return Edit(self.id, self.prompt, self.rejected, text, self.input, self.context, self.spans,
                    annotator, provenance, self.dataset)

    def skip(self, outcome: str, reason: str, annotator: str | None,
             provenance: Provenance) -> Skip:
        """Builds the record of this task without an edit. outcome: skipped or refused."""
        return Skip(self.id, outcome, reason, annotator, provenance, self.content)


class Answer(NamedTuple):
    """An editor's result for one task."""

    text: str | None                              # the whole edited response; None: no usable edit
    reason: str = ""                              # why there is no usable edit
    attempts: int = 1                             # number of answers that the editor was asked for


def content_of(prompt: str, input: str | None, context: tuple[Passage, ...], *texts: str) -> str:
    """Returns 16 hexadecimal digits, the beginning of the sha256 of the texts."""
    passages = [[passage.title, passage.text] for passage in context]
    value = json.dumps([prompt, input, passages, *texts])
    return hashlib.sha256(value.encode()).hexdigest()[:16]


def unnamed(*content) -> str:
    """Returns the id of a record that has none, made from its content (see `content_of`)."""
    return UNNAMED + content_of(*content)


def different(ids: Iterable[str]) -> list[str]:
    """Returns the ids, where the second of two equal ids gets "-2" at its end, and so on."""
    seen, result = Counter(), []
    for id in ids:
        seen[id] += 1
        result.append(id if seen[id] == 1 else f"{id}-{seen[id]}")
    return result


def read_tasks(path: str | Path, limit: int | None = None) -> list[Task]:
    """Reads a file of pairs, of edits or of both; returns the first `limit` tasks in its order.

    The original of an edit is edited again from the start. What holds no preference (ties, equal
    texts) is left out, and counted on stderr. Raises UserError for a file that the readers refuse.
    """
    # The readers' name for a record without an id.
    place = re.compile(rf"{re.escape(Path(path).name)}:(?: record)? ?\d+")
    tasks = [_task(record) for record in read_preferences(path)[:limit]]
    ids = [unnamed(task.prompt, task.input, task.context, task.rejected, task.chosen)
           if place.fullmatch(task.id) else task.id for task in tasks]
    return [replace(task, id=id) for task, id in zip(tasks, different(ids))]


def _task(record: Pair | Edit) -> Task:
    if isinstance(record, Edit):
        return Task(record.id, record.prompt, record.edited, record.original, record.input,
                    record.context, record.spans, record.dataset)
    return Task(record.id, record.prompt, record.chosen, record.rejected, record.input,
                record.context, dataset=record.dataset)


def load_prompt(name: str) -> str:
    """Reads an instruction: the text of fgrlhf/collect/prompts/NAME.txt."""
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
