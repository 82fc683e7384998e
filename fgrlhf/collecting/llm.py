"""A language model as minimal editor: the question, and whether its answer is one.

The model gets fgrlhf/prompts/edit-1.txt and one record, and answers with one JSON object. An answer
is taken when it has exactly that form, is not blank, changes something (or says that nothing needs
changing), changes at most --max-change of the words, and holds nothing of the instruction. When it
falls short the model is told why and asked once more; after that the record is refused.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fgrlhf.collecting.change import excess, measure, words
from fgrlhf.collecting.client import Client, Options
from fgrlhf.collecting.protocol import PROTOCOLS, Reply
from fgrlhf.collecting.tasks import Answer, Task

EDIT_PROMPT = "edit-1"                            # the version that records carry
ANSWERS = 2                                       # asked for at most, per record
LEAK_WORDS = 8                                    # so many words in a row are no coincidence
CHARACTERS_A_TOKEN = 4                            # English, roughly: for the estimate alone
PREAMBLE = re.compile(r"\W*(sure|certainly|of course|here(['’]s| is| are)|"
                      r"(the |my )?(minimally )?edited (response|version|text))\b[^\n]{0,80}?:",
                      re.IGNORECASE)
TAG = re.compile(r"</?(instruction|passage|preferred|response)\b[^>]*>|needs_change\"?\s*:")


class Flaw(ValueError):
    """What is wrong with an answer, said so that the model can mend it."""


class Asked(NamedTuple):
    value: object                                 # None: no answer held up
    attempts: int
    flaw: str                                     # of the last answer, where none held up


def load_prompt(name: str) -> str:
    """The text of fgrlhf/prompts/NAME.txt."""
    return (Path(__file__).parents[1] / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


def tagged(**texts: str | None) -> str:
    """Each text between tags of its name; None is left out."""
    return "\n\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in texts.items()
                       if text is not None)


def question(task: Task) -> str:
    """What the model reads of a task, after the instruction."""
    passages = "\n\n".join(f"<passage title={json.dumps(p.title, ensure_ascii=False)}>\n{p.text}\n"
                           "</passage>" for p in task.context)
    parts = tagged(instruction=task.prompt, input=task.input), passages, tagged(
        preferred=task.chosen, response=task.rejected)
    return "\n\n".join(part for part in parts if part)


def ask(client: Client, system: str, text: str, read: Callable[[str], object]) -> Asked:
    """Ask, `read` the answer, and ask once more with the Flaw it raised."""
    messages = [{"role": "user", "content": text}]
    for attempt in range(1, ANSWERS + 1):
        reply: Reply = client.ask(system, messages)
        try:
            return Asked(read(reply.text), attempt, "")
        except Flaw as error:
            flaw = str(error)
            if not reply.complete:
                flaw = f"the answer was cut short or declined; {flaw}"
        messages += [{"role": "assistant", "content": reply.text.strip() or "(no answer)"},
                     {"role": "user", "content": f"That cannot be used: {flaw}. Answer again, with "
                                                 "the one JSON object and nothing around it."}]
    return Asked(None, ANSWERS, flaw)


def parse_object(text: str, *keys: str) -> dict:
    """The one JSON object that `text` is, with exactly these keys; a code fence may surround it.

    Raises Flaw for anything else, text before or after it and keys given twice included.
    """
    def once(pairs: list) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise Flaw("a key stands twice in the JSON object")
        return dict(pairs)

    fenced = re.fullmatch(r"\s*```(?:json)?\n(.*)\n```\s*", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=once)
    except Flaw:
        raise
    except (ValueError, RecursionError) as error:
        raise Flaw(f"it is not one JSON object ({error})") from None
    if not isinstance(value, dict) or set(value) != set(keys):
        raise Flaw(f"it is not a JSON object with exactly the keys {' and '.join(keys)}")
    return value


def read_edit(text: str, task: Task, max_change: float, instruction: str) -> str:
    """The edited response in a model's answer, within the outer whitespace of the original.

    Where the model says that nothing needs changing that is the original. Raises Flaw.
    """
    value = parse_object(text, "needs_change", "edited")
    needs_change, edited, original = value["needs_change"], value["edited"], task.rejected
    if not isinstance(needs_change, bool) or not isinstance(edited, str | None):
        raise Flaw("needs_change must be true or false, edited a string or null")
    if not needs_change:
        if edited is not None and measure(original, edited).distance:
            raise Flaw("needs_change is false, yet edited differs from the response")
        return original
    if not (edited or "").strip():
        raise Flaw("edited is empty, though needs_change is true")
    try:
        edited.encode("utf-8")
    except UnicodeEncodeError:
        raise Flaw("edited holds half of a surrogate pair") from None
    change = measure(original, edited)
    if not change.distance:
        raise Flaw("edited has the same words as the response, though needs_change is true")
    if problem := excess(change, max_change) or leak(edited, task, instruction):
        raise Flaw(problem)
    start = len(original) - len(original.lstrip())
    return original[:start] + edited.strip() + original[len(original.rstrip()):]


def leak(edited: str, task: Task, instruction: str) -> str | None:
    """What an edit says that belongs to the conversation and not to the response; None if nothing.

    A preamble or a tag of the question that the response did not have, or LEAK_WORDS words in a
    row of the instruction that the record does not have.
    """
    tags = (found[0] for found in TAG.finditer(edited))
    for found in (_preamble(edited, task.rejected), *tags):
        if found and found not in task.rejected:
            return f"edited holds {found!r}, which is no part of a response"
    for run in sorted(_runs(edited) & (_runs(instruction) - _runs(question(task)))):
        return f"edited repeats the editing instruction ({' '.join(run)!r})"
    return None


def _preamble(edited: str, original: str) -> str | None:
    """The first preamble that is not the original's own, edited: "Here are 3 tips:" may become 4.

    The two texts' preambles go together in order; one that speaks of an edit is never the
    original's own unless that speaks of one, too.
    """
    here = there = 0
    while found := PREAMBLE.match(edited, here):
        own = PREAMBLE.match(original, there)
        if own is None or "edited" in found[0].lower() and "edited" not in own[0].lower():
            return found[0]
        here, there = found.end(), own.end()
    return None


def _runs(text: str) -> set[tuple[str, ...]]:
    """Every LEAK_WORDS words in a row, in lower case."""
    said = [text[start:end].lower() for start, end in words(text)]
    return {tuple(said[i:i + LEAK_WORDS]) for i in range(len(said) - LEAK_WORDS + 1)}


def editor(client: Client, max_change: float) -> Callable[[Task], Answer]:
    """The model as an editor of tasks; raises as `Client.ask` does."""
    instruction = load_prompt(EDIT_PROMPT)

    def edit(task: Task) -> Answer:
        asked = ask(client, instruction, question(task),
                    lambda text: read_edit(text, task, max_change, instruction))
        return Answer(asked.value, asked.flaw, asked.attempts)

    return edit


def preview(options: Options, tasks: list[Task], show: int = 2) -> str:
    """What would be sent for the first `show` tasks, and an estimate for all of them.

    Tokens by the rule of thumb of 4 characters; an answer is as long as its response, and each
    record is taken to need one answer.
    """
    instruction, protocol = load_prompt(EDIT_PROMPT), PROTOCOLS[options.api]
    url = (options.base_url or protocol.base_url).rstrip("/") + protocol.path
    lines = []
    for task in tasks[:show]:
        body = protocol.body(options.model or "MODEL", instruction,
                             [{"role": "user", "content": question(task)}], options.max_tokens)
        lines += [f"POST {url}    (record {task.id!r})",
                  json.dumps(body, ensure_ascii=False, indent=1), ""]
    sent = sum(len(instruction) + len(question(task)) for task in tasks) // CHARACTERS_A_TOKEN
    answered = sum(len(task.rejected) + 40 for task in tasks) // CHARACTERS_A_TOKEN
    return "\n".join([*lines, f"{len(tasks)} requests, about {sent:,} tokens in and {answered:,} "
                              f"out ({CHARACTERS_A_TOKEN} characters a token); nothing was sent"])
