"""A language model as minimal editor: builds the question and checks the answer.

The model gets the instruction prompts/edit-1.txt and one record, and answers with one JSON object.
Reasoning (<think>...</think>) and text around the object are ignored. An answer is accepted if it
    - has the expected form and is not blank,
    - changes something, or says that nothing needs a change,
    - changes at most --max-change of the words, or at most --free-words words,
    - repeats nothing of the instruction.
Otherwise the model is told what is wrong and asked once more. After a second bad answer the record
is refused.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fgrlhf.collect.change import FREE_WORDS, excess, measure, words
from fgrlhf.collect.client import Client, Options
from fgrlhf.collect.line_ends import keep_line_ends
from fgrlhf.collect.protocol import PROTOCOLS, Reply, endpoint
from fgrlhf.collect.tasks import Answer, Task, load_prompt
from fgrlhf.data.records import Passage

EDIT_PROMPT = "edit-1"                            # records keep this name as prompt_version
ANSWERS = 2                                       # the model is asked at most so often per record
LEAK_WORDS = 8                                    # so many equal words in a row are no accident
CHARACTERS_PER_TOKEN = 4                          # roughly, in English; only for the estimate
LONGEST_SEARCH = 10**9                            # characters before all "{", about a second
PREAMBLE = re.compile(r"\W*(sure|certainly|of course|here(['’]s| is| are)|"
                      r"(the |my )?(minimally )?edited (response|version|text))\b[^\n]{0,80}?:",
                      re.IGNORECASE)
# How models mark their reasoning. Some begin to reason without an opening mark.
_NAMES = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad)"
REASONING = re.compile(rf"\s*(?:<{_NAMES}>|\[THINK\]|◁think▷|(?:<\|start\|>assistant)?"
                       r"<\|channel\|>(?:analysis|commentary))", re.IGNORECASE)
OBJECT_OR_END = re.compile(rf"\{{|(</{_NAMES}>|\[/THINK\]|◁/think▷|<\|channel\|>final)",
                           re.IGNORECASE)
TAG = re.compile(r"</?(instruction|passage|preferred|response)\b[^>]*>|needs_change\"?\s*:")


class Flaw(ValueError):
    """The reason why an answer is not usable, worded for the model."""


class Asked(NamedTuple):
    value: object                                 # None: no answer was usable
    attempts: int
    flaw: str                                     # of the last answer, if none was usable


def tagged(prompt: str, input: str | None, context: Iterable[Passage], **texts: str) -> str:
    """Puts the parts of a prompt, and then each of the texts, between tags of their names."""
    between = lambda name, text: f"<{name}>\n{text}\n</{name}>"
    parts = [between("instruction", prompt)] + ([] if input is None else [between("input", input)])
    parts += [f"<passage title={json.dumps(passage.title, ensure_ascii=False)}>\n{passage.text}\n"
              "</passage>" for passage in context]
    return "\n\n".join([*parts, *(between(name, text) for name, text in texts.items())])


def question(task: Task) -> str:
    """Builds the question about a task. The instruction is sent separately."""
    return tagged(task.prompt, task.input, task.context, preferred=task.chosen,
                  response=task.rejected)


def ask(client: Client, system: str, text: str, read: Callable[[str], object]) -> Asked:
    """Asks, and reads the answer with `read`. If it raises Flaw, asks once more with the flaw."""
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
    """Reads the one JSON object that has these keys, and returns these keys only.

    Text around the object is ignored, such as a code fence, and so is everything up to the end of
    the model's reasoning. Raises Flaw if there is no such object, if two differ, or if the
    reasoning does not end.
    """
    def once(pairs: list) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise Flaw("a key appears twice in the JSON object")
        return dict(pairs)

    decoder = json.JSONDecoder(object_pairs_hook=once)
    found, at, reasons, nothing = [], 0, bool(REASONING.match(text)), "it is not one JSON object"
    problem, searched = nothing, 0
    while mark := OBJECT_OR_END.search(text, at):
        at = mark.end()
        if mark[1]:                               # what was found is a draft
            found, reasons, problem = [], False, nothing
            continue
        searched += mark.start()                  # json counts the lines up to here for its message
        if searched > LONGEST_SEARCH:
            raise Flaw(f"{nothing} (it has too many opening braces)")
        try:
            value, at = decoder.raw_decode(text, mark.start())
        except Flaw:
            raise
        except (ValueError, RecursionError) as error:
            problem = f"{nothing} ({error})"
            continue
        if set(keys) <= set(value):
            found.append({key: value[key] for key in keys})
        problem = f"it is not a JSON object with the keys {' and '.join(keys)}"
    if reasons:
        raise Flaw("the reasoning does not end")
    if not found:
        raise Flaw(problem)
    if any(value != found[0] for value in found):
        raise Flaw("it has several JSON objects that differ")
    return found[0]


def read_edit(text: str, task: Task, max_change: float, instruction: str,
              free_words: int = FREE_WORDS) -> str:
    """Reads the edited response from a model's answer. Raises Flaw if it is not acceptable.

    Returns the original if the model says that nothing needs a change. The whitespace at both ends
    and the kind of the line ends are always those of the original.
    """
    value = parse_object(text, "needs_change", "edited")
    needs_change, edited, original = value["needs_change"], value["edited"], task.rejected
    if not isinstance(needs_change, bool) or not isinstance(edited, str | None):
        raise Flaw("needs_change must be true or false, edited a string or null")
    if not needs_change:
        if edited is not None and measure(original, edited).parts.distance:
            raise Flaw("needs_change is false, yet edited differs from the response")
        return original
    if not (edited or "").strip():
        raise Flaw("edited is empty, though needs_change is true")
    try:
        edited.encode("utf-8")
    except UnicodeEncodeError:
        raise Flaw("edited contains half of a surrogate pair") from None
    change = measure(original, edited)
    if not change.parts.distance:
        raise Flaw("edited has the same words and marks as the response, though needs_change is "
                   "true")
    if problem := excess(change, max_change, free_words) or leak(edited, task, instruction):
        raise Flaw(problem)
    start, end = len(original) - len(original.lstrip()), len(original.rstrip())
    return (original[:start] + keep_line_ends(original[start:end], edited.strip())
            + original[end:])


def leak(edited: str, task: Task, instruction: str) -> str | None:
    """Finds text in an edit that belongs to the conversation, not to the response; None if clean.

    Such text is a preamble or a tag of the question that the original does not have, or LEAK_WORDS
    words in a row from the instruction that the record does not have.
    """
    tags = (found[0] for found in TAG.finditer(edited))
    for found in (_preamble(edited, task.rejected), *tags):
        if found and found not in task.rejected:
            return f"edited contains {found!r}, which does not belong to a response"
    for run in sorted(_runs(edited) & (_runs(instruction) - _runs(question(task)))):
        return f"edited repeats the editing instruction ({' '.join(run)!r})"
    return None


def _preamble(edited: str, original: str) -> str | None:
    """Returns the first preamble that the model added, or None.

    An edited preamble of the original is allowed: "Here are 3 tips:" may become 4. The preambles of
    both texts are compared in order. A preamble that mentions an edit is allowed only if the
    original's preamble does so too.
    """
    here = there = 0
    while found := PREAMBLE.match(edited, here):
        own = PREAMBLE.match(original, there)
        if own is None or "edited" in found[0].lower() and "edited" not in own[0].lower():
            return found[0]
        here, there = found.end(), own.end()
    return None


def _runs(text: str) -> set[tuple[str, ...]]:
    """Returns every LEAK_WORDS words in a row, in lower case."""
    said = [word.lower() for word in words(text)]
    return {tuple(said[i:i + LEAK_WORDS]) for i in range(len(said) - LEAK_WORDS + 1)}


def editor(client: Client, max_change: float,
           free_words: int = FREE_WORDS) -> Callable[[Task], Answer]:
    """Returns the model as an editor of tasks. The editor raises what `Client.ask` raises."""
    instruction = load_prompt(EDIT_PROMPT)

    def edit(task: Task) -> Answer:
        asked = ask(client, instruction, question(task),
                    lambda text: read_edit(text, task, max_change, instruction, free_words))
        return Answer(asked.value, asked.flaw, asked.attempts)

    return edit


def preview(options: Options, tasks: list[Task], show: int = 2) -> str:
    """Describes the requests for the first `show` tasks, and estimates the tokens for all tasks.

    The estimate assumes 4 characters per token, one answer per record, and an answer as long as the
    response.
    """
    instruction, protocol = load_prompt(EDIT_PROMPT), PROTOCOLS[options.api]
    url = endpoint(protocol, options.base_url)
    lines = []
    for task in tasks[:show]:
        body = protocol.body(options.model or "MODEL", instruction,
                             [{"role": "user", "content": question(task)}], options.max_tokens)
        lines += [f"POST {url}    (record {task.id!r})",
                  json.dumps(body, ensure_ascii=False, indent=1), ""]
    sent = sum(len(instruction) + len(question(task)) for task in tasks) // CHARACTERS_PER_TOKEN
    answered = sum(len(task.rejected) + 40 for task in tasks) // CHARACTERS_PER_TOKEN
    return "\n".join([*lines, f"{len(tasks)} requests, about {sent:,} tokens in and {answered:,} "
                              f"out ({CHARACTERS_PER_TOKEN} characters per token); nothing was "
                              "sent"])
