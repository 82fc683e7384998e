"""Conversations become text. A conversation is a list of messages, as TRL's data sets have them.

    {"role": "system", "content": "Be brief."}          at most one, and the first
    {"role": "user", "content": "Name a river."}        then user and assistant by turns
    {"role": "assistant", "content": "The Rhine."}

The last message of the assistant is a response. The messages before it are the prompt:

    one of the user             its text
    several                     each with its role before it, "User: ..." and "Assistant: ..."
    a system message            its text comes first
    between two messages        an empty line

Nothing ends the prompt, because the template does that (fgrlhf/templates.py). The strings of
hh-rlhf, which say "\\n\\nHuman: " and "\\n\\nAssistant: ", are conversations too.
"""

import re

from fgrlhf.data.fields import check, refuse, show

Message = tuple[str, str]                                # (role, text)

_HUMAN = re.compile(r"\s*Human:")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_NAMES = {"Human": "user", "Assistant": "assistant"}


def is_conversation(value: dict) -> bool:
    """Says if a record has conversations, or has responses that begin with their prompt."""
    parts = [value.get(name) for name in ("prompt", "chosen", "rejected", "completion", "messages")]
    return any(isinstance(part, list) for part in parts) or (
        parts[0] is None and any(isinstance(part, str) and _HUMAN.match(part)
                                 for part in parts[1:3]))


def flatten(value: dict, place: str) -> dict:
    """Returns a record with text in place of its conversations.

    chosen and rejected: the response, or the prompt and the response. messages: a prompt, with or
    without a response, which becomes `output`. Raises UserError for roles out of order, for parts
    that are not text, and for two sides with different prompts.
    """
    flat, prompts = dict(value), {}
    for name in ("chosen", "rejected", "completion", "messages"):
        part = value.get(name)
        if part is None:
            continue
        if name == "messages" and _ends_with_user(part):
            prompts[name] = _messages(part, place, name, "user")
            continue
        before, flat["output" if name == "messages" else name] = _split(part, place, name)
        if before:
            prompts[name] = before
    prompt = value.get("prompt")
    if isinstance(prompt, list):
        prompts["prompt"] = _messages(prompt, place, "prompt", "user")
    names = list(prompts)
    for name in names[1:]:
        if prompts[name] != prompts[names[0]]:
            refuse(place, name, f"the prompt of {names[0]}, {show(render(prompts[names[0]]))}",
                   render(prompts[name]))
    if names:
        messages = prompts[names[0]]
        texts = [render(messages), *(text for role, text in messages if role == "user")]
        if isinstance(prompt, str) and prompt.strip() not in [text.strip() for text in texts]:
            refuse(place, names[0], f"a conversation that begins with the prompt, {show(prompt)}",
                   render(messages))
        flat["prompt"] = render(messages)
    return flat


def render(messages: list[Message]) -> str:
    """Returns the prompt that the messages are, see the module's docstring."""
    named = sum(role != "system" for role, _ in messages) > 1
    return "\n\n".join(f"{role.capitalize()}: {text}" if named and role != "system" else text
                       for role, text in messages)


def _ends_with_user(part) -> bool:
    return (isinstance(part, list) and bool(part) and isinstance(part[-1], dict)
            and part[-1].get("role") == "user")


def _split(part, place: str, field: str) -> tuple[list[Message], str]:
    """Returns (the messages before the response, the response)."""
    if isinstance(part, str) and not _HUMAN.match(part):
        return [], part
    messages = _messages(part, place, field, "assistant")
    return messages[:-1], messages[-1][1]


def _messages(part, place: str, field: str, last: str) -> list[Message]:
    """Returns the messages of a conversation that ends with a message of the role `last`."""
    if isinstance(part, str):
        texts = _TURN.split(part.strip())[1:]
        part = [{"role": _NAMES[name], "content": text.strip()}
                for name, text in zip(texts[::2], texts[1::2])]
    if not isinstance(part, list) or not part:
        refuse(place, field, "a string, or a list of messages {role, content}", part)
    messages = []
    for i, message in enumerate(part):
        where = f"{field}[{i}]"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            refuse(place, where, "a message {role, content}", message)
        messages.append((message["role"], _text(message["content"], place, f"{where}.content")))
    roles = [role for role, _ in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    response_only = last == "assistant" and roles == ["assistant"]
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not response_only and (turns != expected or not turns or turns[-1] != last):
        refuse(place, field, "the roles user and assistant by turns, at most one system before "
               f"them, and {last} last", roles)
    return [(role, text) for role, text in messages if role != "system" or text.strip()]


def _text(content, place: str, field: str) -> str:
    """Returns the text of a message: a string, or parts {"type": "text", "text": ...}."""
    if isinstance(content, str):
        return check(str, content, place, field)
    if not isinstance(content, list) or not content:
        refuse(place, field, "a string, or a list of parts {type: text, text}", content)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            refuse(place, f"{field}[{i}]", "a part {type: text, text}", part)
    return "".join(check(str, part.get("text"), place, f"{field}[{i}].text")
                   for i, part in enumerate(content))
