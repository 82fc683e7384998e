"""What is to be edited: the less preferred response of each preference, from any format read."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fgrlhf.config import UserError
from fgrlhf.edits import Edit, Pair, Passage, Provenance, Span
from fgrlhf.readers import read_edits, read_pairs


@dataclass(frozen=True)
class Task:
    """One preference: `rejected` is to be edited, `chosen` may be shown beside it."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    input: str | None = None
    context: tuple[Passage, ...] = ()
    spans: tuple[Span, ...] | None = None         # error spans of `rejected`, never shown

    def edit(self, text: str, annotator: str | None, provenance: Provenance) -> Edit:
        """The record of this task edited to `text`; the spans travel along, for evaluation."""
        return Edit(self.id, self.prompt, self.rejected, text, self.input, self.context, self.spans,
                    annotator, provenance)


class Answer(NamedTuple):
    """What an editor made of a task."""

    text: str | None                              # the whole edited response; None: none held up
    reason: str = ""                              # why there is none
    attempts: int = 1                             # answers asked for


def read_tasks(path: str | Path, limit: int | None = None) -> list[Task]:
    """Tasks in file order, the first `limit` of them, from any file of pairs or of edits.

    Of an edit the original is edited anew. Ties and pairs of equal texts hold no preference and are
    left out. Raises UserError as the readers do.
    """
    pairs: list[Pair | Edit]
    try:
        pairs = read_edits(path)                  # keeps the error spans that read_pairs drops
    except UserError:
        pairs = read_pairs(path)                  # knows every other format, and names the fault
    tasks = [Task(p.id, p.prompt, p.edited, p.original, p.input, p.context, p.spans)
             if isinstance(p, Edit) else
             Task(p.id, p.prompt, p.chosen, p.rejected, p.input, p.context) for p in pairs]
    tasks = [task for task in tasks if task.chosen != task.rejected][:limit]
    if not tasks:
        raise UserError(f"{path}: expected at least one preference between two different texts, "
                        "got none; check that this is the right file")
    return tasks
