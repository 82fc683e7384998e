"""Answers in AlpacaEval's format, and the answers of another system to the same prompts.

An Output keeps the fields that AlpacaEval does not know in `other`; `input` and `context` are such
fields, and they are part of the prompt.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence

from fgrlhf.data.fields import UserError, check, show
from fgrlhf.data.records import Output, Passage


def input_of(output: Output) -> str | None:
    """Returns the `input` of an AlpacaEval output, or None. Raises UserError unless it is text."""
    value = json.loads(dict(output.other).get("input", "null"))
    return check(str | None, value, f"output to {show(output.instruction)}", "input") or None


def passages_of(output: Output) -> tuple[Passage, ...]:
    """Returns the `context` of an AlpacaEval output. Raises UserError unless it is passages."""
    context = dict(output.other).get("context")
    return check(tuple[Passage, ...] | None, json.loads(context or "null"),
                 f"output to {show(output.instruction)}", "context") or ()


def joined(outputs: list[Output], reference: list[Output],
           names: tuple[str, str] = ("outputs", "reference")) -> list[Output]:
    """Returns `outputs` in the order of `reference`, joined by instruction, input and context.

    The context counts when both lists have such a field. When one prompt has several answers, the
    first is joined with the first. Raises UserError, which names a prompt that only one of the two
    lists answers. names: of the two lists, for the message.
    """
    both = all(any(map(_context, part)) for part in (outputs, reference))
    key = lambda output: (*prompt_key(output), _context(output) if both else None)
    found = defaultdict(list)
    for output in outputs:
        found[key(output)].append(output)
    given, asked = Counter(map(key, outputs)), Counter(map(key, reference))
    for name, have, other, wanted in ((names[0], given, names[1], asked),
                                      (names[1], asked, names[0], given)):
        if missing := list(wanted - have):
            (instruction, extra, context), more = missing[0], len(missing) - 1
            raise UserError(
                f"{name}: expected an answer to every prompt of {other}, got {have[missing[0]]} of "
                f"{wanted[missing[0]]} to {show(instruction)}"
                + (f" with the input {show(extra)}" if extra else "")
                + (f" with the context {show(context)}" if context else "")
                + (f" and too few to {more} more" if more else "")
                + "; answer both from one prompt file")
    return [found[key(output)].pop(0) for output in reference]


def tell_empty(answers: Sequence[str], place: str) -> None:
    """Says on stderr how many of the answers are empty or blank. place: where they are from."""
    if empty := sum(not answer.strip() for answer in answers):
        print(f"{empty} of {len(answers)} answers of {place} are empty", file=sys.stderr)


def prompt_key(output: Output) -> tuple[str, str | None]:
    """Returns the instruction and the input of an output."""
    return output.instruction, input_of(output)


def _context(output: Output) -> str | None:
    """Returns the `context` of an output as JSON, the same for equal values, or None."""
    value = json.loads(dict(output.other).get("context", "null"))
    return json.dumps(value, sort_keys=True) if value else None
