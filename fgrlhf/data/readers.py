"""Readers: the formats of records. The names of its fields tell which format a record has.

    Edit            native; QA-Feedback's, DeFacto's and CoachLM's as published
    Pair            native, TRL's, AlpacaFarm's and AlpacaEval's comparisons, or an Edit
    Prompt          native, Alpaca's and AlpacaEval's, or any other record that has a prompt
    Demonstration   native, TRL's, Alpaca's and AlpacaEval's, or an Edit or a Pair
    Output, Annotation            AlpacaEval's

Every reader takes JSON lines or one JSON array, plain or gzip, and returns records in file order or
raises UserError (on_bad_record: see files.each). A file may mix formats. A record without `id` gets
its place as its id, such as "pairs.json: record 3". Conversations become text by the rule in
conversations.py.

Edits, and other records with an `id` and a `prompt`, are native: unknown fields are refused, so
that a misspelt `spans` is noticed. Elsewhere unknown fields are ignored, because their owners add
fields freely. An edit that changes nothing is a valid Edit (the annotator found no error), but it
is not a Pair. README.md in this folder has an example of each format.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fgrlhf.data import coachlm, conversations, defacto, qa_feedback
from fgrlhf.data.fields import Id, Label, Text, UserError, check, refuse, show, take
from fgrlhf.data.files import LeftOut, read_records
from fgrlhf.data.records import (
    Annotation, Demonstration, Edit, NoEdit, Output, Pair, Passage, Prompt, normalise_edit,
    sort_spans)

PUBLISHED = (qa_feedback, defacto, coachlm)
QA_FEEDBACK = ("missing", "preferences")      # fields of an older form of QA-Feedback's edits


@dataclass(frozen=True)
class _Instruction:
    """A record of Alpaca (with `output`) or a question of AlpacaEval (without)."""
    instruction: Text
    output: str | None = None
    input: str | None = None
    id: Id | None = None
    context: tuple[Passage, ...] = ()
    dataset: Label = None


@dataclass(frozen=True)
class _Unjudged(_Instruction):
    """Two outputs that nobody has compared: AlpacaFarm's outputs_pairs.json."""


def read_edits(path: str | Path, on_bad_record: str = "stop") -> list[Edit]:
    """Reads edits. The spans of an edit are returned sorted."""
    return read_records(path, _any_as(_as_edit), on_bad_record)


def read_pairs(path: str | Path, on_bad_record: str = "stop") -> list[Pair]:
    """Reads pairs in any of their formats. The edited side of an Edit is its chosen side.

    Ties, annotations whose preference is null, and pairs of two equal texts hold no preference.
    They are left out, and counted on stderr.
    """
    return read_records(path, _any_as(_as_pair), on_bad_record)


def read_preferences(path: str | Path, on_bad_record: str = "stop",
                     normalise: bool = False) -> list[Edit | Pair]:
    """Reads edits as edits, with their spans, and other preferences as pairs, from one file.

    normalise: collapse runs of whitespace in edits, see normalise_edit. What holds no preference is
    left out as in `read_pairs`.
    """
    def convert(record, place: str) -> Edit | Pair | LeftOut:
        if not isinstance(record, Edit):
            return _as_pair(record, place)
        edit = normalise_edit(record) if normalise else record
        return LeftOut("the edit changes nothing") if edit.original == edit.edited else edit
    return read_records(path, _any_as(convert), on_bad_record)


def read_prompts(path: str | Path, on_bad_record: str = "stop") -> list[Prompt]:
    """Reads the prompts of records of any format."""
    return read_records(path, _any_as(_as_prompt), on_bad_record)


def read_demonstrations(path: str | Path, on_bad_record: str = "stop") -> list[Demonstration]:
    """Reads responses to imitate: outputs, the edited sides of Edits, the chosen sides of Pairs."""
    return read_records(path, _any_as(_as_demonstration), on_bad_record)


def read_outputs(path: str | Path, on_bad_record: str = "stop") -> list[Output]:
    """Reads AlpacaEval's model_outputs.json. Every other key is kept in `other`.

    A record without `generator` gets the name of the file, "mine" for "mine.json".
    """
    name = Path(path).name.split(".")[0] or "outputs"
    return read_records(path, lambda value, place: _output(value, place, name), on_bad_record)


def read_annotations(path: str | Path, on_bad_record: str = "stop") -> list[Annotation]:
    """Reads AlpacaEval's annotations.json, ties and null preferences included."""
    return read_records(path, _annotation, on_bad_record)


# ----- one JSON value -> one record ---------------------------------------------------------------

def _annotation(value, place: str) -> Annotation:
    annotation = check(Annotation, _with_passages(value), place, also=value)
    if annotation.preference not in (None, 0) and not 1 <= annotation.preference <= 2:
        refuse(place, "preference", "1 to 2, 0 or null", annotation.preference)
    return annotation


def _output(value, place: str, generator: str) -> Output:
    for field, kind in (("instruction", Text), ("output", str)):    # of the record as it is given
        take(value, field, kind, place)
    if value.get("generator") is None:
        value = value | {"generator": generator}
    output = check(Output, value, place, also=value)
    known = ("instruction", "output", "generator", "id")
    return dataclasses.replace(output, other=tuple(
        (check(str, key, place, "field name"),
         check(str, json.dumps(item, ensure_ascii=False, allow_nan=False), place, show(key)))
        for key, item in value.items() if key not in known))


def _any(value, place: str):
    """Builds the record that the names of the fields of `value` describe."""
    if not isinstance(value, dict):
        refuse(place, "record", "an object", value)
    names = set(value)
    for data_set in PUBLISHED:
        if data_set.FIELDS <= names:
            return data_set.build_edit(value, place)
    foreign = value.get("id") is None or bool(names & {"instruction", "completion", "messages"})
    if value.get("id") is None:
        value = value | {"id": Path(place).name}
    if names & {"original", "edited"}:
        return sort_spans(check(Edit, value, place, also=QA_FEEDBACK), place)
    if names & {"output_1", "output_2"}:
        return (_annotation(value, place) if "preference" in names else
                check(_Unjudged, _with_passages(value), place, also=value))
    paired = bool(names & {"chosen", "rejected"})
    if "instruction" in names and not paired:
        return check(_Instruction, _with_passages(value), place, also=value)
    if conversations.is_conversation(value):
        value, foreign = conversations.flatten(value, place), True
    for ours, theirs in (("prompt", "instruction"), ("output", "completion")):
        if theirs in names:
            value = {ours: value[theirs]} | value
    if "prompt" not in value:
        raise UserError(f"{place}: prompt: expected this field, got only {show(sorted(names))}; "
                        "rename or add the field")
    kind = Pair if paired else Demonstration if "output" in value else Prompt
    record = check(kind, value, place, also=value if foreign else ())
    label = value.get("label") if "completion" in names else None      # TRL's unpaired preferences
    if label not in (None, 0, 1):
        refuse(place, "label", "true or false", label)
    if label == 0:
        return NoEdit(check(Prompt, value, place, also=value), "the completion's label is false")
    return record


def _with_passages(value):
    """Returns a record whose `context` is passages: Dolly's is one text without a title."""
    context = value.get("context") if isinstance(value, dict) else None
    if not isinstance(context, str):
        return value
    passages = [{"title": "Context", "text": context}] if context.strip() else []
    return value | {"context": passages}


def _any_as(convert: Callable) -> Callable:
    """Returns a `build` for read_records: a record of any format, then its conversion."""
    return lambda value, place: convert(_any(value, place), place)


def _as_edit(record, place: str) -> Edit | LeftOut:
    if isinstance(record, NoEdit):
        return LeftOut(record.why)
    if not isinstance(record, Edit):
        raise UserError(f"{place}: expected an edit (original, edited), got {_fields_of(record)}; "
                        "choose a file of edits")
    return record


def _as_pair(record, place: str) -> Pair | LeftOut:
    match record:
        case Pair():
            pair = record
        case Edit():
            if record.edited == record.original:
                return LeftOut("the edit changes nothing")
            pair = Pair(record.id, record.prompt, record.edited, record.original, record.input,
                        record.context, record.annotator, record.dataset)
        case NoEdit(why=why):
            return LeftOut(why)
        case Annotation(winner=None):
            return LeftOut("the preference is null" if record.preference is None else "a tie")
        case Annotation(winner=winner):
            first = check(Text, record.output_1, place, "output_1")
            second = check(Text, record.output_2, place, "output_2")
            chosen, rejected = (first, second) if winner == 1 else (second, first)
            pair = Pair(record.id, record.instruction, chosen, rejected, record.input or None,
                        record.context, record.annotator)
        case _Unjudged():
            raise UserError(f"{place}: preference: expected this field (1 to 2, 0 or null), got "
                            "two outputs without it; add the field, or choose a file of pairs")
        case _:
            raise UserError(f"{place}: expected a pair (chosen, rejected; original, edited; or "
                            f"output_1, output_2, preference), got {_fields_of(record)}; choose a "
                            "file of pairs")
    return LeftOut("the two texts are equal") if pair.chosen == pair.rejected else pair


def _fields_of(record) -> str:
    return f"the fields of {type(record).__name__.strip('_')}"


def _as_prompt(record, place: str) -> Prompt:
    if isinstance(record, NoEdit):
        record = record.record
    if isinstance(record, Annotation):
        return Prompt(record.id, record.instruction, record.input or None, record.context)
    if isinstance(record, _Instruction):
        return Prompt(record.id, record.instruction, record.input or None, record.context,
                      record.dataset)
    return Prompt(record.id, record.prompt, record.input, record.context, record.dataset)


def _as_demonstration(record, place: str) -> Demonstration | LeftOut:
    if isinstance(record, NoEdit):
        return (record.record if isinstance(record.record, Demonstration) else
                LeftOut(record.why))
    if isinstance(record, (Annotation, _Unjudged)):
        record = _as_pair(record, place)
        if isinstance(record, LeftOut):
            return record
    prompt = _as_prompt(record, place)
    field = {Edit: "edited", Pair: "chosen"}.get(type(record), "output")
    output = getattr(record, field, None)
    if output is None:
        raise UserError(f"{place}: output: expected this field, got {_fields_of(record)}; add the "
                        "field, or choose a file of demonstrations, edits or pairs")
    check(Text, output, place, field)
    return Demonstration(prompt.id, prompt.prompt, output, prompt.input, prompt.context,
                         prompt.dataset)
