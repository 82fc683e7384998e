"""Records: the data that the project learns from and writes (paper, section 2.1).

    Edit                    (x, y-, y+): `original` is y-, `edited` is its minimal edit y+
    Pair                    (x, chosen, rejected): an ordinary preference
    Prompt                  x: for rollouts
    Demonstration           (x, output): for imitation
    Output, Annotation      AlpacaEval's model_outputs.json and annotations.json

Every record is frozen and hashable. An integer id, such as 7, is read as the text "7". Texts are
kept as they are in the file; `normalise_edit` replaces each run of whitespace by one blank.
readers.py has the formats that records are read from.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fgrlhf.data.fields import Id, Label, Text, check, refuse
from fgrlhf.data.files import write_atomic


@dataclass(frozen=True)
class Passage:
    """A text that the prompt refers to, such as a paragraph of Wikipedia."""
    title: str
    text: str


@dataclass(frozen=True)
class Span:
    """Characters start..end-1 of Edit.original that a human marked as wrong; 0 <= start < end."""
    start: int
    end: int
    type: Text


@dataclass(frozen=True)
class Provenance:
    """How an edit or a judgement was made. `fgrlhf.collect` writes one into each of its records."""
    editor: Text                                  # human, llm or simulated
    time: Text                                    # when it was accepted: 2026-11-21T12:00:00Z
    attempts: int                                 # number of answers asked for, this one included
    seconds: float                                # from showing the response to accepting the edit
    model: str | None = None
    prompt_version: str | None = None             # the instruction's file in fgrlhf/collect/prompts


@dataclass(frozen=True)
class Edit:
    """A minimal edit: `edited` is the preferred response, made from `original` by an editor."""
    id: Id
    prompt: Text
    original: Text
    edited: Text
    input: str | None = None
    context: tuple[Passage, ...] = ()
    spans: tuple[Span, ...] | None = None         # sorted; None: not annotated, (): nothing wrong
    annotator: str | None = None
    provenance: Provenance | None = None
    dataset: Label = None                         # where the prompt is from: simulate/origin.py


@dataclass(frozen=True)
class Pair:
    """An ordinary preference: `chosen` is preferred to `rejected`."""
    id: Id
    prompt: Text
    chosen: Text
    rejected: Text
    input: str | None = None
    context: tuple[Passage, ...] = ()
    annotator: str | None = None
    dataset: Label = None


@dataclass(frozen=True)
class Prompt:
    """A request without a response."""
    id: Id
    prompt: Text
    input: str | None = None
    context: tuple[Passage, ...] = ()
    dataset: Label = None


@dataclass(frozen=True)
class Demonstration:
    """A request with a response, `output`, to imitate."""
    id: Id
    prompt: Text
    output: Text
    input: str | None = None
    context: tuple[Passage, ...] = ()
    dataset: Label = None


@dataclass(frozen=True)
class Output:
    """A record of AlpacaEval's model_outputs.json.

    A blank output is not refused: the model said nothing, and loses the comparison.
    """
    instruction: Text
    output: str
    generator: Text
    id: Id | None = None
    other: tuple[tuple[str, str], ...] = ()       # (key, JSON text): dataset, datasplit and so on

    @property
    def dataset(self) -> str | None:
        """The name of the data set that the prompt is from, or None."""
        return check(Label, json.loads(dict(self.other).get("dataset", "null")), "")


@dataclass(frozen=True)
class Annotation:
    """A judgement of output_1 against output_2, in the fields of AlpacaEval and AlpacaFarm."""
    instruction: Text
    output_1: str
    output_2: str
    preference: float | None                      # 1 .. 2; 0 is a tie, null a failed judgement
    generator_1: str | None = None
    generator_2: str | None = None
    annotator: str | None = None
    input: str | None = None
    id: Id | None = None
    context: tuple[Passage, ...] = ()

    @property
    def winner(self) -> int | None:
        """1 for a preference below 1.5, 2 above; None for a tie (1.5, 0) and for null."""
        if self.preference in (None, 0, 1.5):
            return None
        return 1 if self.preference < 1.5 else 2


@dataclass(frozen=True)
class NoEdit:
    """A published record without an edit that can be used. `why` says why, for the user."""
    record: Prompt | Demonstration                # what the record can still be used for
    why: str


def sort_spans(edit: Edit, place: str, field: str = "spans") -> Edit:
    """Returns the edit with its spans in order. Raises UserError for a span outside `original`."""
    for i, span in enumerate(edit.spans or ()):
        if not 0 <= span.start < span.end <= len(edit.original):
            refuse(place, f"{field}[{i}]", f"0 <= start < end <= {len(edit.original)}, the length "
                   "of original", [span.start, span.end])
    if edit.spans is None:
        return edit
    return dataclasses.replace(edit, spans=tuple(sorted(
        edit.spans, key=lambda span: (span.start, span.end, span.type))))


# ----- writing ------------------------------------------------------------------------------------

def write_jsonl(path: str | Path, records: Iterable) -> None:
    """Writes one JSON object per line, atomically. Fields at their default are omitted."""
    lines = [json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"
             for record in records]
    write_atomic(path, "".join(lines).encode("utf-8"))


def plain(record) -> dict:
    """Returns the fields of a record as a dict, without those at their default (None or ())."""
    values = dataclasses.asdict(record)
    return {field.name: values[field.name] for field in dataclasses.fields(record)
            if getattr(record, field.name) != field.default}


def write_outputs(path: str | Path, outputs: Iterable[Output]) -> None:
    """Writes AlpacaEval's model_outputs.json: one indented JSON array."""
    values = []
    for output in outputs:
        value = plain(output)
        value.pop("other", None)
        values.append(value | {key: json.loads(text) for key, text in output.other})
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, indent=1)
    write_atomic(path, (text + "\n").encode("utf-8"))


# ----- whitespace ---------------------------------------------------------------------------------

def normalise_whitespace(text: str, spans: Iterable[Span] = ()) -> tuple[str, tuple[Span, ...]]:
    """Returns " ".join(text.split()), and the spans in the offsets of the new text.

    In a run of whitespace between two words the first character stays, as a blank. A span keeps
    exactly those of its characters that stay; a span of which no character stays is dropped.
    """
    kept, new = [], []                            # new[i]: how many characters before i stay
    last = len(text.rstrip())
    for i, character in enumerate(text):
        new.append(len(kept))
        if not character.isspace():
            kept.append(character)
        elif 0 < i < last and not text[i - 1].isspace():
            kept.append(" ")
    new.append(len(kept))
    moved = (Span(new[span.start], new[span.end], span.type) for span in spans)
    return "".join(kept), tuple(span for span in moved if span.start < span.end)


def normalise_edit(edit: Edit) -> Edit:
    """Returns the edit with normalised whitespace in both texts, and its spans moved along."""
    original, spans = normalise_whitespace(edit.original, edit.spans or ())
    return dataclasses.replace(edit, original=original, edited=normalise_whitespace(edit.edited)[0],
                               spans=None if edit.spans is None else spans)
