"""Reads the tasks (one less preferred response each) and the instructions for the editors."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_edits, read_pairs
from fgrlhf.data.records import Edit, Pair, Passage, Provenance, Span


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

    def edit(self, text: str, annotator: str | None, provenance: Provenance) -> Edit:
        """Builds the record of this task edited to `text`. It keeps the spans, for evaluation."""
        return Edit(self.id, self.prompt, self.rejected, text, self.input, self.context, self.spans,
                    annotator, provenance)


class Answer(NamedTuple):
    """An editor's result for one task."""

    text: str | None                              # the whole edited response; None: no usable edit
    reason: str = ""                              # why there is no usable edit
    attempts: int = 1                             # number of answers that the editor was asked for


def read_tasks(path: str | Path, limit: int | None = None) -> list[Task]:
    """Reads a file of pairs or of edits; returns the first `limit` tasks in the order of the file.

    The original of an edit is edited again from the start. Ties and pairs of equal texts are left
    out, because they hold no preference. Raises UserError for a file that the readers refuse.
    """
    pairs: list[Pair | Edit]
    try:
        pairs = read_edits(path)                  # keeps the error spans, which read_pairs drops
    except UserError:
        pairs = read_pairs(path)                  # reads the other formats, or names what is wrong
    tasks = [Task(p.id, p.prompt, p.edited, p.original, p.input, p.context, p.spans)
             if isinstance(p, Edit) else
             Task(p.id, p.prompt, p.chosen, p.rejected, p.input, p.context) for p in pairs]
    tasks = [task for task in tasks if task.chosen != task.rejected][:limit]
    if not tasks:
        raise UserError(f"{path}: expected at least one preference between two different texts, "
                        "got none; check that this is the right file")
    return tasks


def load_prompt(name: str) -> str:
    """Reads an instruction: the text of fgrlhf/collect/prompts/NAME.txt."""
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
