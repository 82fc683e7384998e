"""DeFacto (Liu et al. 2023, arXiv 2212.09968): its train, val and test files as published.

    article             a news article, the prompt
    candidate           a summary by a model
    doc_id              an integer, the id
    has_error           True if the annotator found a factual error in the candidate
    feedback.summary    the candidate with a human's minimal edit, where there is an error
    feedback.evidence   the sentence of the article that the annotator chose as evidence

A record is the edit from `candidate` to `feedback.summary`. Where the annotator found no error, the
edit changes nothing, and a summary that is given nevertheless is not used.

An article has about 500 tokens. `read_evidence_edits` makes the evidence the prompt, which is about
30 tokens: enough to check a summary against, and a fifteenth of the work. An annotator chose the
evidence with the error in view, so it is not a prompt for new summaries.
"""

from dataclasses import replace
from pathlib import Path

from fgrlhf.data.fields import Id, Text, take
from fgrlhf.data.files import LeftOut, read_records
from fgrlhf.data.records import Edit, NoEdit, Prompt

FIELDS = {"article", "candidate", "feedback"}


def build_edit(value: dict, place: str) -> Edit | NoEdit:
    """Builds the edit of a candidate. A record with an error and a blank summary holds no edit."""
    id, article = take(value, "doc_id", Id, place), take(value, "article", Text, place)
    candidate = take(value, "candidate", Text, place)
    has_error = take(value, "has_error", bool, place)
    if not has_error:
        return Edit(id, article, candidate, candidate)
    summary = take(value["feedback"], "summary", str | None, place, "feedback.")
    if not (summary or "").strip():
        return NoEdit(Prompt(id, article), "the error is not corrected")
    return Edit(id, article, candidate, summary)


def read_evidence_edits(path: str | Path, on_bad_record: str = "stop") -> list[Edit]:
    """Returns the edits that change something, each with its evidence as the prompt.

    A record with a blank evidence keeps its article. on_bad_record: see files.each.
    """
    return read_records(path, _with_evidence, on_bad_record)


def _with_evidence(value, place: str) -> Edit | LeftOut:
    edit = build_edit(value, place)
    if isinstance(edit, NoEdit):
        return LeftOut(edit.why)
    if edit.original == edit.edited:
        return LeftOut("the edit changes nothing")
    evidence = take(value["feedback"], "evidence", str | None, place, "feedback.")
    return replace(edit, prompt=evidence if (evidence or "").strip() else edit.prompt)
