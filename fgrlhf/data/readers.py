"""Readers: the formats of records. The names of its fields tell which format a record has.

    Edit            native
    Pair            native, TRL's, AlpacaFarm's and AlpacaEval's comparisons, or an Edit
    Prompt          native, Alpaca's and AlpacaEval's, or any other record that has a prompt
    Demonstration   native, Alpaca's and AlpacaEval's, or an Edit or a Pair
    Output, Annotation            AlpacaEval's

Every reader takes JSONL or one JSON array, and returns records in file order or raises UserError
(on_bad_record: see files.each). Native records refuse unknown fields, so that a misspelt `spans` is
noticed. In foreign records unknown fields are ignored, because their owners add fields freely. An
edit that changes nothing is a valid Edit (the annotator found no error), but it is not a Pair.
README.md in this folder has an example of each format.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fgrlhf.data.fields import Text, UserError, check, refuse, show
from fgrlhf.data.files import read_records
from fgrlhf.data.records import Annotation, Demonstration, Edit, Output, Pair, Prompt

QA_FEEDBACK = ("missing", "preferences")      # fields of QA-Feedback's edits that no Edit needs


@dataclass(frozen=True)
class _Instruction:
    """A record of Alpaca (with `output`) or a question of AlpacaEval (without)."""
    instruction: Text
    output: str | None = None
    input: str | None = None
    id: str | None = None


def read_edits(path: str | Path, on_bad_record: str = "stop") -> list[Edit]:
    """Reads native edits. The spans of an edit are returned sorted."""
    return read_records(path, build_edit, on_bad_record)


def read_pairs(path: str | Path, on_bad_record: str = "stop") -> list[Pair]:
    """Reads pairs in any of their formats. The edited side of an Edit is its chosen side.

    Ties, and pairs of two equal texts, hold no preference and are left out. A record with `chosen`
    and `rejected` is TRL's when it has no `id`, otherwise it is native. The id of a record without
    `id` is its place, such as "pairs.json: record 3".
    """
    return read_records(path, _any_as(_as_pair), on_bad_record)


def read_prompts(path: str | Path, on_bad_record: str = "stop") -> list[Prompt]:
    """Reads the prompts of records of any format."""
    return read_records(path, _any_as(_as_prompt), on_bad_record)


def read_demonstrations(path: str | Path, on_bad_record: str = "stop") -> list[Demonstration]:
    """Reads responses to imitate: outputs, the edited sides of Edits, the chosen sides of Pairs."""
    return read_records(path, _any_as(_as_demonstration), on_bad_record)


def read_outputs(path: str | Path, on_bad_record: str = "stop") -> list[Output]:
    """Reads AlpacaEval's model_outputs.json. Every other key is kept in `other`."""
    return read_records(path, _output, on_bad_record)


def read_annotations(path: str | Path, on_bad_record: str = "stop") -> list[Annotation]:
    """Reads AlpacaEval's annotations.json, ties included."""
    return read_records(path, _annotation, on_bad_record)


# ----- one JSON value -> one record ---------------------------------------------------------------

def build_edit(value, place: str, kind: type = Edit):
    """Builds an Edit, or a `kind` of Edit, from decoded JSON. Refuses spans outside `original`."""
    edit = check(kind, value, place, also=QA_FEEDBACK)
    for i, span in enumerate(edit.spans or ()):
        if not 0 <= span.start < span.end <= len(edit.original):
            refuse(place, f"spans[{i}]", f"0 <= start < end <= {len(edit.original)}, the length of "
                   "original", [span.start, span.end])
    if edit.spans is None:
        return edit
    return dataclasses.replace(edit, spans=tuple(sorted(
        edit.spans, key=lambda span: (span.start, span.end, span.type))))


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
    """TRL's prompt, chosen and rejected: strings, or conversations of one message each."""
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
    """Builds the record that the names of the fields of `value` describe."""
    names = set(value) if isinstance(value, dict) else set()
    if "instruction" in names:
        if names & {"output_1", "output_2"}:
            return _annotation(value, place)
        return check(_Instruction, value, place, also=value)
    if names & {"chosen", "rejected"}:
        return check(Pair, value, place) if "id" in names else _trl(value, place)
    if names & {"original", "edited"}:
        return build_edit(value, place)
    return check(Demonstration if "output" in names else Prompt, value, place)


def _any_as(convert: Callable) -> Callable:
    """Returns a `build` for read_records: a record of any format, then its conversion."""
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
