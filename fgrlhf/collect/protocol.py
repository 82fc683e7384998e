"""The requests and answers of Anthropic's Messages API and OpenAI's chat API, as data.

Nothing here sends anything. A protocol turns a question into headers and a body, and the decoded
body of a response into a Reply.
"""

import email.utils
import os
import urllib.parse
from typing import NamedTuple

from fgrlhf.data.fields import UserError


class Reply(NamedTuple):
    text: str
    complete: bool                                # False: cut at the length limit, or declined


class Protocol(NamedTuple):
    base_url: str
    path: str
    variable: str                                 # the environment variable that holds the key

    def headers(self, key: str) -> dict[str, str]:
        """The headers that carry the key; without a key, none do."""
        if self is ANTHROPIC:
            return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {})
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(self, model: str, system: str, messages: list[dict], max_tokens: int) -> dict:
        """Builds the body of a request.

        messages: [{"role": "user" or "assistant", "content": str}]; the first is the user's.
        """
        if self is ANTHROPIC:
            return {"model": model, "max_tokens": max_tokens, "system": system,
                    "messages": messages}
        # No limit here: servers call it by different names, and each has a default.
        return {"model": model, "messages": [{"role": "system", "content": system}, *messages]}

    def reply(self, value) -> Reply:
        """Reads the answer in a decoded body.

        Raises LookupError, TypeError or ValueError if the body holds no answer.
        """
        if self is ANTHROPIC:
            text = "".join(b["text"] for b in value["content"] if b["type"] == "text")
            return Reply(text, value["stop_reason"] in ("end_turn", "stop_sequence"))
        choice = value["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError("content is not a string")
        return Reply(text, choice["finish_reason"] == "stop")


ANTHROPIC = Protocol("https://api.anthropic.com", "/v1/messages", "ANTHROPIC_API_KEY")
OPENAI = Protocol("https://api.openai.com/v1", "/chat/completions", "OPENAI_API_KEY")
PROTOCOLS = {"anthropic": ANTHROPIC, "openai": OPENAI}


def is_local(url: str) -> bool:
    """True if a URL leads to this machine."""
    return urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def key_of(protocol: Protocol, url: str, own_server: bool) -> str:
    """Reads the key from the environment; "" if the user's own server (--base-url) needs no key.

    Raises UserError if the key is missing, malformed, or would be sent unencrypted to another
    machine. The message never contains a part of the key.
    """
    key, parts = os.environ.get(protocol.variable, "").strip(), urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise UserError("--base-url: expected http(s)://host[:port][/path] without a user or a "
                        f"password, got another form; put the key into {protocol.variable}")
    if not key and not own_server:
        raise UserError(f"{protocol.variable}: expected the key in the environment, got nothing; "
                        f"export {protocol.variable}=...")
    if not all("!" <= c <= "~" for c in key):
        raise UserError(f"{protocol.variable}: expected a key of printable ASCII without spaces, "
                        "got other characters; copy it again")
    if key and parts.scheme == "http" and not is_local(url):
        raise UserError(f"--base-url {url}: expected https, because http would send the key "
                        f"unencrypted; unset {protocol.variable} if the server needs no key")
    return key


def retry_after(value: str | None, now: float) -> float:
    """Reads a Retry-After header (a number or an HTTP date); returns the seconds to wait, or 0.

    now: the current time in seconds since 1970. Other values of the header give 0.
    """
    try:
        wait = float(value)
    except (TypeError, ValueError):
        try:
            wait = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (TypeError, ValueError, IndexError, OverflowError):
            return 0.0
    return max(0.0, wait) if wait == wait else 0.0
