"""QA-Feedback (Wu et al. 2023, arXiv 2306.01693) in two JSONL files, joined by `id`.

    edits.jsonl         an Edit per line, of response 1: a human's correction and error spans; also
                        "preferences": human choices between the responses 1 to 4, for the pairs
                        12, 13, 14, 23, 24, 34 in this order: 1 or 2 is better, 0 is a tie
    candidates.jsonl    {"id", "candidates": {"2": text, "3": text, "4": text}}

`readers.read_edits` reads the edits. `read_qa_feedback_pairs` reads ordinary preferences on the
same prompts, so that the two kinds of reward model can be compared on real data.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from fgrlhf.data.fields import Text, check, refuse
from fgrlhf.data.files import read_records
from fgrlhf.data.readers import build_edit
from fgrlhf.data.records import Edit, Pair


@dataclass(frozen=True)
class _Ranked(Edit):
    """A line of edits.jsonl, with its preferences."""
    preferences: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Candidates:
    """A line of candidates.jsonl."""
    id: Text
    candidates: dict[str, Text]


def read_qa_feedback_pairs(edits: str | Path, candidates: str | Path,
                           on_bad_record: str = "stop") -> list[Pair]:
    """Returns a Pair for each human preference between two responses, in file order.

    The id of a pair names its responses: "<id>-13". Ties and pairs of equal texts are left out.
    Raises UserError for a record without candidates. on_bad_record: see files.each.
    """
    others = {record.id: record.candidates
              for record in read_records(candidates, _candidates, on_bad_record)}

    def build(value, place):
        record = _ranked(value, place)
        if record.id not in others:
            refuse(place, "id", f"an id that {candidates} has", record.id)
        return record

    pairs = []
    for record in read_records(edits, build, on_bad_record):
        responses = {"1": record.original} | others[record.id]
        for (first, second), better in zip(combinations("1234", 2), record.preferences):
            if better == 0 or responses[first] == responses[second]:
                continue
            chosen, rejected = (first, second) if better == 1 else (second, first)
            pairs.append(Pair(f"{record.id}-{first}{second}", record.prompt, responses[chosen],
                              responses[rejected], record.input, record.context, record.annotator))
    return pairs


def _ranked(value, place: str) -> _Ranked:
    record = build_edit(value, place, _Ranked)
    if len(record.preferences) != 6 or not set(record.preferences) <= {0, 1, 2}:
        refuse(place, "preferences", "six of 0, 1 and 2", list(record.preferences))
    return record


def _candidates(value, place: str) -> _Candidates:
    record = check(_Candidates, value, place)
    if set(record.candidates) != {"2", "3", "4"}:
        refuse(place, "candidates", "the keys 2, 3 and 4", sorted(record.candidates))
    return record
