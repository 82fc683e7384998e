"""Records: what the project learns from and writes down (paper, section 3: the data).

    Edit         (x, y-, y+): y- = `original`, y+ = `edited`, its minimal edit
    Pair         (x, chosen, rejected): an ordinary preference
    Prompt, Demonstration         for rollouts and for imitation
    Output, Annotation            AlpacaEval's model_outputs.json and annotations.json

Every record is frozen and hashable. Texts are kept as they stand; `normalise_edit` gives those who
want it one blank between words. readers.py has the formats these are read from.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fgrlhf.config import UserError
from fgrlhf.fields import Text
from fgrlhf.files import write_atomic


@dataclass(frozen=True)
class Passage:
    """A grounding text."""
    title: str
    text: str


@dataclass(frozen=True)
class Span:
    """Characters start..end-1 of Edit.original that a human marked as wrong; 0 <= start < end."""
    start: int
    end: int
    type: str


@dataclass(frozen=True)
class Provenance:
    """How an edit came about: `fgrlhf.collect` writes one into each of its records."""
    editor: Text                                  # human, llm or simulated
    time: Text                                    # when it was accepted: 2026-11-21T12:00:00Z
    attempts: int                                 # answers asked for until this one
    seconds: float                                # from showing the response to accepting the edit
    model: str | None = None
    prompt_version: str | None = None             # the instruction's file in fgrlhf/prompts


@dataclass(frozen=True)
class Edit:
    """`edited` is the preferred response, made from `original` by an editor."""
    id: Text
    prompt: Text
    original: Text
    edited: Text
    input: str | None = None
    context: tuple[Passage, ...] = ()
    spans: tuple[Span, ...] | None = None         # sorted; None: nobody looked, (): nothing wrong
    annotator: str | None = None
    provenance: Provenance | None = None


@dataclass(frozen=True)
class Pair:
    """`chosen` is preferred to `rejected`."""
    id: Text
    prompt: Text
    chosen: Text
    rejected: Text
    input: str | None = None
    context: tuple[Passage, ...] = ()
    annotator: str | None = None


@dataclass(frozen=True)
class Prompt:
    id: Text
    prompt: Text
    input: str | None = None
    context: tuple[Passage, ...] = ()


@dataclass(frozen=True)
class Demonstration:
    """`output` is a response to imitate."""
    id: Text
    prompt: Text
    output: Text
    input: str | None = None
    context: tuple[Passage, ...] = ()


@dataclass(frozen=True)
class Output:
    """One record of AlpacaEval's model_outputs.json.

    A blank output is a model that said nothing: it loses, it is not refused.
    """
    instruction: Text
    output: str
    generator: Text
    id: str | None = None
    other: tuple[tuple[str, str], ...] = ()       # (key, JSON text): dataset, datasplit and so on


@dataclass(frozen=True)
class Annotation:
    """One judgement of output_1 against output_2, in AlpacaEval's and AlpacaFarm's fields."""
    instruction: Text
    output_1: str
    output_2: str
    preference: float | None                      # 1 .. 2; 0 and null are ties
    generator_1: str | None = None
    generator_2: str | None = None
    annotator: str | None = None
    input: str | None = None
    id: str | None = None

    @property
    def winner(self) -> int | None:
        """1 or 2: preference below or above 1.5; None, a tie, at 1.5, 0 and null."""
        if self.preference in (None, 0, 1.5):
            return None
        return 1 if self.preference < 1.5 else 2


# Writers.

def write_jsonl(path: str | Path, records: Iterable) -> None:
    """One JSON object a line, UTF-8, atomically; a field at its default (None, ()) is omitted."""
    lines = [json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records]
    write_atomic(path, "".join(lines).encode("utf-8"))


def plain(record) -> dict:
    values = dataclasses.asdict(record)
    return {field.name: values[field.name] for field in dataclasses.fields(record)
            if getattr(record, field.name) != field.default}


def write_outputs(path: str | Path, outputs: Iterable[Output]) -> None:
    """AlpacaEval's model_outputs.json: one indented JSON array."""
    values = []
    for output in outputs:
        value = plain(output)
        value.pop("other", None)
        values.append(value | {key: json.loads(text) for key, text in output.other})
    write_atomic(path, (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode("utf-8"))


# Texts.

def normalise_whitespace(text: str, spans: Iterable[Span] = ()) -> tuple[str, tuple[Span, ...]]:
    """" ".join(text.split()), and the spans in the new text's offsets.

    Of a run of whitespace between words the first character stays, as a blank; a span keeps exactly
    those of its characters that stay, and vanishes when none does.
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
    """The edit with normalised whitespace in `original` (its spans moved along) and `edited`."""
    original, spans = normalise_whitespace(edit.original, edit.spans or ())
    return dataclasses.replace(edit, original=original, edited=normalise_whitespace(edit.edited)[0],
                               spans=None if edit.spans is None else spans)


def _alpaca(record) -> str:
    if record.input:
        return ("Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{record.prompt}\n\n### Input:\n{record.input}\n\n### Response:")
    return ("Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{record.prompt}\n\n### Response:")


def _qa(record) -> str:
    passages = "".join(f"{passage.title}: {passage.text}\n\n" for passage in record.context)
    return f"{passages}### Question:\n{record.prompt}\n\n### Response:"


def _plain_prompt(record) -> str:
    return f"{record.prompt}\n{record.input} ->" if record.input else f"{record.prompt} ->"


TEMPLATES = {"alpaca": _alpaca, "qa": _qa, "plain": _plain_prompt}


def render_prompt(record, template: str) -> str:
    """The text the policy sees before the response, of any record with prompt, input and context.

    alpaca: the Stanford Alpaca instruction prompt, with or without input; qa: the passages, then
    the question (`input` is not shown); plain: "prompt ->", for tiny models. None ends in a blank,
    since the response's first piece brings its own. Raises UserError for an unknown template.
    """
    if template not in TEMPLATES:
        raise UserError(f"template: expected one of {', '.join(TEMPLATES)}, got {template!r}; "
                        "choose one of these")
    return TEMPLATES[template](record)
