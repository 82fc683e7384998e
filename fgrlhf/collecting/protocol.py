"""How language models are spoken to: Anthropic's Messages API and OpenAI's chat API, as data.

Nothing here sends anything: a protocol turns a question into headers and a body, and a decoded body
into an answer.
"""

import email.utils
import os
import urllib.parse
from typing import NamedTuple

from fgrlhf.config import UserError


class Reply(NamedTuple):
    text: str
    complete: bool                                # False: cut at the longest length, or declined


class Protocol(NamedTuple):
    base_url: str
    path: str
    variable: str                                 # the environment's name for the key

    def headers(self, key: str) -> dict[str, str]:
        if self is ANTHROPIC:
            return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {})
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(self, model: str, system: str, messages: list[dict], max_tokens: int) -> dict:
        """messages: [{"role": "user" or "assistant", "content": str}], the first one the user's."""
        if self is ANTHROPIC:
            return {"model": model, "max_tokens": max_tokens, "system": system,
                    "messages": messages}
        # No length here: its name differs between servers, and each has a limit of its own.
        return {"model": model, "messages": [{"role": "system", "content": system}, *messages]}

    def reply(self, value) -> Reply:
        """The answer in a decoded body; LookupError, TypeError, ValueError where there is none."""
        if self is ANTHROPIC:
            text = "".join(b["text"] for b in value["content"] if b["type"] == "text")
            return Reply(text, value["stop_reason"] in ("end_turn", "stop_sequence"))
        choice = value["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError("content is no text")
        return Reply(text, choice["finish_reason"] == "stop")


ANTHROPIC = Protocol("https://api.anthropic.com", "/v1/messages", "ANTHROPIC_API_KEY")
OPENAI = Protocol("https://api.openai.com/v1", "/chat/completions", "OPENAI_API_KEY")
PROTOCOLS = {"anthropic": ANTHROPIC, "openai": OPENAI}


def is_local(url: str) -> bool:
    """Whether a URL names this very machine."""
    return urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def key_of(protocol: Protocol, url: str, own_server: bool) -> str:
    """The key in the environment, "" where the user's own server needs none.

    Raises UserError, without a letter of the key, where it is missing, malformed, or would travel
    in the clear.
    """
    key, parts = os.environ.get(protocol.variable, "").strip(), urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise UserError("--base-url: expected http(s)://host[:port][/path] without a user or a "
                        "password; the key belongs into the environment")
    if not key and not own_server:
        raise UserError(f"{protocol.variable}: expected the key in the environment, got nothing; "
                        f"export {protocol.variable}=...")
    if not all("!" <= c <= "~" for c in key):
        raise UserError(f"{protocol.variable}: expected a key of printable ASCII without blanks; "
                        "copy it again")
    if key and parts.scheme == "http" and not is_local(url):
        raise UserError(f"--base-url {url}: would send the key in the clear; use https, or unset "
                        f"{protocol.variable} if the server needs none")
    return key


def retry_after(value: str | None, now: float) -> float:
    """Seconds to wait by a Retry-After header (a number or an HTTP date); 0 without a usable one.

    now: seconds since 1970, for the date.
    """
    try:
        wait = float(value)
    except (TypeError, ValueError):
        try:
            wait = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (TypeError, ValueError, IndexError, OverflowError):
            return 0.0
    return max(0.0, wait) if wait == wait else 0.0
