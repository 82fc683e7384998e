"""DeFacto (Liu et al. 2023, arXiv 2212.09968): its train, val and test files as published.

    article             a news article, the prompt
    candidate           a summary by a model
    doc_id              an integer, the id
    has_error           True if the annotator found a factual error in the candidate
    feedback.summary    the candidate with a human's minimal edit, where there is an error
    feedback.evidence   the sentence of the article that the annotator chose as evidence

A record is the edit from `candidate` to `feedback.summary`. Where the annotator found no error, the
edit changes nothing, and a summary that is given nevertheless is not used.

An article has about 500 tokens. `read_evidence_edits` and `read_summaries` make the evidence the
prompt, which is about 30 tokens: enough to check a summary against, and a fifteenth of the work. An
annotator chose the evidence with the candidate in view, so it names what the candidate is about.
"""

from dataclasses import replace
from pathlib import Path

from fgrlhf.data.fields import Id, Text, take
from fgrlhf.data.files import LeftOut, read_records
from fgrlhf.data.records import Demonstration, Edit, NoEdit, Passage, Prompt

FIELDS = {"article", "candidate", "feedback"}


def build_edit(value: dict, place: str) -> Edit | NoEdit:
    """Builds the edit of a candidate. A record with an error and a blank summary holds no edit."""
    id, article = take(value, "doc_id", Id, place), take(value, "article", Text, place)
    candidate = take(value, "candidate", Text, place)
    has_error = take(value, "has_error", bool, place)
    if not has_error:
        return Edit(id, article, candidate, candidate)
    summary = take(value.get("feedback"), "summary", str | None, place, "feedback.")
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
    return replace(edit, prompt=_evidence(value, place) or edit.prompt)


def read_summaries(path: str | Path, on_bad_record: str = "stop") -> list[Demonstration]:
    """Returns every candidate, right or wrong, as the answer to its evidence.

    The article is the only passage of its context, which no template shows without being asked. A
    record with a blank evidence keeps its article as the prompt. on_bad_record: see files.each.
    """
    return read_records(path, _with_article, on_bad_record)


def _with_article(value, place: str) -> Demonstration:
    id, article = take(value, "doc_id", Id, place), take(value, "article", Text, place)
    return Demonstration(id, _evidence(value, place) or article,
                         take(value, "candidate", Text, place),
                         context=(Passage("article", article),))


def _evidence(value: dict, place: str) -> str | None:
    """Returns the evidence, or None when it is blank."""
    evidence = take(value.get("feedback"), "evidence", str | None, place, "feedback.")
    return evidence if (evidence or "").strip() else None
