"""DeFacto (Liu et al. 2023, arXiv 2212.09968): its train, val and test files as published.

    article             a news article, the prompt
    candidate           a summary by a model
    doc_id              an integer, the id
    has_error           True if the annotator found a factual error in the candidate
    feedback.summary    the candidate with a human's minimal edit, where there is an error

A record is the edit from `candidate` to `feedback.summary`. Where the annotator found no error, the
edit changes nothing, and a summary that is given nevertheless is not used.
"""

from fgrlhf.data.fields import Id, Text, take
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
