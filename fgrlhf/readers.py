"""Readers: the formats records come in, each told by its field names and refused with its place.

    Edit            native JSONL
    Pair            native JSONL, TRL, AlpacaFarm's pairwise JSON, QA-Feedback, any file of Edits
    Prompt          native JSONL, Alpaca or AlpacaEval JSON, any record that has a prompt
    Demonstration   native JSONL, Alpaca or AlpacaEval JSON, any file of Edits or Pairs
    Output, Annotation            AlpacaEval's JSON

JSONL and one JSON array are both taken everywhere. Native records refuse unknown fields (a misspelt
`spans` must not vanish); foreign ones ignore them, for their owners add fields freely. An edit that
changes nothing is a valid Edit (the annotator found nothing to mend), and no Pair.
"""

import dataclasses
import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from fgrlhf.config import UserError
from fgrlhf.edits import Annotation, Demonstration, Edit, Output, Pair, Prompt
from fgrlhf.fields import Text, check, refuse, show
from fgrlhf.files import read_records


@dataclass(frozen=True)
class _Instruction:
    """Alpaca's own data (with `output`) and AlpacaEval's questions (without)."""
    instruction: Text
    output: str | None = None
    input: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class _Ranked(Edit):
    """A QA-Feedback record, with human preferences among its four responses."""
    preferences: tuple[int, ...] = ()             # 12 13 14 23 24 34: 1 or 2 is better, 0 a tie


@dataclass(frozen=True)
class _Candidates:
    """The responses 2-4 of a QA-Feedback record; response 1 is its `original`."""
    id: Text
    candidates: dict[str, Text]


# Readers. Each returns a list in file order, or raises UserError; for `on_bad_record` see
# files.read_records.

def read_edits(path: str | Path, on_bad_record: str = "stop") -> list[Edit]:
    """Edits from native JSONL; spans come back sorted."""
    return read_records(path, _edit, on_bad_record)


def read_pairs(path: str | Path, on_bad_record: str = "stop") -> list[Pair]:
    """Pairs from native JSONL, TRL, AlpacaFarm's or AlpacaEval's comparisons, or Edits.

    An Edit's `edited` is preferred to its `original`. Ties, and pairs of two equal texts, hold no
    preference and are left out. A record without an `id` is called by its place, as
    "pairs.json: record 3"; chosen / rejected without an `id` is TRL's format, with one it is ours.
    """
    return read_records(path, _through(_as_pair), on_bad_record)


def read_prompts(path: str | Path, on_bad_record: str = "stop") -> list[Prompt]:
    """Prompts from native JSONL, Alpaca or AlpacaEval JSON, or any record that has a prompt."""
    return read_records(path, _through(_as_prompt), on_bad_record)


def read_demonstrations(path: str | Path, on_bad_record: str = "stop") -> list[Demonstration]:
    """Demonstrations from native JSONL, Alpaca or AlpacaEval JSON, Edits' edited, Pairs' chosen."""
    return read_records(path, _through(_as_demonstration), on_bad_record)


def read_outputs(path: str | Path, on_bad_record: str = "stop") -> list[Output]:
    """AlpacaEval's model_outputs.json; every other key is kept in `other`."""
    return read_records(path, _output, on_bad_record)


def read_annotations(path: str | Path, on_bad_record: str = "stop") -> list[Annotation]:
    """AlpacaEval's annotations.json, ties included."""
    return read_records(path, _annotation, on_bad_record)


def read_qa_feedback_pairs(edits: str | Path, candidates: str | Path,
                           on_bad_record: str = "stop") -> list[Pair]:
    """Ordinary pairs on the prompts of QA-Feedback's edits; the id tells the two: "<id>-13".

    The preferences stand in the file `edits`, the responses 2-4 in `candidates`, joined by id. Ties
    and equal texts are left out.
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


# One JSON value -> one record.

def _edit(value, place: str, kind: type = Edit):
    edit = check(kind, value, place, also=("missing", "preferences"))   # QA-Feedback has these two
    for i, span in enumerate(edit.spans or ()):
        if not 0 <= span.start < span.end <= len(edit.original):
            refuse(place, f"spans[{i}]", f"0 <= start < end <= {len(edit.original)}, the length of "
                   "original", [span.start, span.end])
    if edit.spans is None:
        return edit
    return dataclasses.replace(edit, spans=tuple(sorted(
        edit.spans, key=lambda span: (span.start, span.end, span.type))))


def _ranked(value, place: str) -> _Ranked:
    record = _edit(value, place, _Ranked)
    if len(record.preferences) != 6 or not set(record.preferences) <= {0, 1, 2}:
        refuse(place, "preferences", "six of 0, 1 and 2", list(record.preferences))
    return record


def _candidates(value, place: str) -> _Candidates:
    record = check(_Candidates, value, place)
    if set(record.candidates) != {"2", "3", "4"}:
        refuse(place, "candidates", "the keys 2, 3 and 4", sorted(record.candidates))
    return record


def _annotation(value, place: str) -> Annotation:
    annotation = check(Annotation, value, place, also=value)
    if annotation.preference not in (None, 0) and not 1 <= annotation.preference <= 2:
        refuse(place, "preference", "1 to 2, 0 or null", annotation.preference)
    return annotation


def _output(value, place: str) -> Output:
    output = check(Output, value, place, also=value)
    known = ("instruction", "output", "generator", "id")
    return dataclasses.replace(output, other=tuple(
        (check(str, key, place, "field name"),
         check(str, json.dumps(item, ensure_ascii=False), place, show(key)))
        for key, item in value.items() if key not in known))


def _trl(value: dict, place: str) -> Pair:
    """TRL's prompt/chosen/rejected: strings, or conversations of one message each."""
    fields = {"id": Path(place).name}
    for name in ("prompt", "chosen", "rejected"):
        text = value.get(name)
        if isinstance(text, list):
            if len(text) != 1 or not isinstance(text[0], dict) or "content" not in text[0]:
                refuse(place, name, "a string, or a list of one message {role, content}", text)
            text = text[0]["content"]
        fields[name] = check(Text, text, place, name)
    return Pair(**fields)


def _any(value, place: str):
    """The record that `value` is, told by its field names."""
    names = set(value) if isinstance(value, dict) else set()
    if "instruction" in names:
        if names & {"output_1", "output_2"}:
            return _annotation(value, place)
        return check(_Instruction, value, place, also=value)
    if names & {"chosen", "rejected"}:
        return check(Pair, value, place) if "id" in names else _trl(value, place)
    if names & {"original", "edited"}:
        return _edit(value, place)
    return check(Demonstration if "output" in names else Prompt, value, place)


def _through(convert):
    """A `build` for read_records: any known record, then `convert`ed to the kind asked for."""
    return lambda value, place: convert(_any(value, place), place)


def _as_pair(record, place: str) -> Pair | None:
    match record:
        case Pair():
            pair = record
        case Edit():
            pair = Pair(record.id, record.prompt, record.edited, record.original, record.input,
                        record.context, record.annotator)
        case Annotation(winner=None):
            return None
        case Annotation(winner=winner):
            first = check(Text, record.output_1, place, "output_1")
            second = check(Text, record.output_2, place, "output_2")
            chosen, rejected = (first, second) if winner == 1 else (second, first)
            pair = Pair(record.id or Path(place).name, record.instruction, chosen, rejected,
                        record.input or None, annotator=record.annotator)
        case _:
            raise UserError(f"{place}: expected a pair (chosen, rejected; original, edited; or "
                            "output_1, output_2, preference), got the fields of "
                            f"{type(record).__name__.strip('_')}; choose a file of pairs")
    return None if pair.chosen == pair.rejected else pair


def _as_prompt(record, place: str) -> Prompt:
    if isinstance(record, (_Instruction, Annotation)):
        return Prompt(record.id or Path(place).name, record.instruction, record.input or None)
    return Prompt(record.id, record.prompt, record.input, record.context)


def _as_demonstration(record, place: str) -> Demonstration:
    prompt = _as_prompt(record, place)
    field = {Edit: "edited", Pair: "chosen"}.get(type(record), "output")
    output = check(Text, getattr(record, field, None), place, field)
    return Demonstration(prompt.id, prompt.prompt, output, prompt.input, prompt.context)
