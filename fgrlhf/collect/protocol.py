"""The requests and answers of Anthropic's Messages API and OpenAI's chat API, as data.

Nothing here sends anything. A protocol turns a question into headers and a body, and the decoded
body of a response into a Reply.
"""

import email.utils
import os
import re
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
            text, reason = _text(value["content"]), value.get("stop_reason")
        else:
            choice = value["choices"][0]
            text, reason = _text(choice["message"].get("content")), choice.get("finish_reason")
        if not text and reason is None:
            raise LookupError("neither a text nor a reason for stopping")
        return Reply(text, str(reason).lower() not in CUT)


# After these reasons for stopping an answer is not whole. Servers have many names for the others.
CUT = ("length", "max_tokens", "model_length", "model_context_window_exceeded", "content_filter",
       "refusal", "safety", "error", "pause_turn", "tool_use", "tool_calls", "function_call")
TEXT = ("text", "output_text")                    # the types of the parts that are not reasoning


def _text(content) -> str:
    """Returns the text of an answer: a string, null, or a list of parts of which some are text."""
    if isinstance(content, list):
        content = "".join(part if isinstance(part, str) else part["text"] for part in content
                          if isinstance(part, str) or part.get("type", "text") in TEXT)
    if not isinstance(content, str | None):
        raise TypeError("content is neither a string nor a list of parts")
    return content or ""


ANTHROPIC = Protocol("https://api.anthropic.com", "/v1/messages", "ANTHROPIC_API_KEY")
OPENAI = Protocol("https://api.openai.com/v1", "/chat/completions", "OPENAI_API_KEY")
PROTOCOLS = {"anthropic": ANTHROPIC, "openai": OPENAI}


def endpoint(protocol: Protocol, base_url: str | None) -> str:
    """Returns the URL of the requests. Raises UserError for a --base-url of another form."""
    url = protocol.base_url if base_url is None else base_url
    try:
        parts = urllib.parse.urlsplit(url)
        parts.hostname.encode("idna")
        good = (parts.port != 0 and parts.scheme in ("http", "https") and "@" not in parts.netloc
                and not set("?#") & set(url) and all("!" <= c <= "~" for c in url))
    except (ValueError, AttributeError):
        good = False
    if not good:
        raise UserError("--base-url: expected http(s)://host[:port][/path] without a user or a "
                        f"password, got another form; put the key into {protocol.variable}")
    return url.rstrip("/") + protocol.path


def is_local(url: str) -> bool:
    """True if a URL leads to this machine."""
    return urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def key_of(protocol: Protocol, url: str, own_server: bool) -> str:
    """Reads the key from the environment; "" if the user's own server (--base-url) needs no key.

    Raises UserError if the key is missing, malformed, or would be sent unencrypted to another
    machine. The message never contains a part of the key.
    """
    key = os.environ.get(protocol.variable, "").strip()
    if not key and not own_server:
        raise UserError(f"{protocol.variable}: expected the key in the environment, got nothing; "
                        f"export {protocol.variable}=...")
    if not all("!" <= c <= "~" for c in key):
        raise UserError(f"{protocol.variable}: expected a key of printable ASCII without spaces, "
                        "got other characters; copy it again")
    if key and urllib.parse.urlsplit(url).scheme == "http" and not is_local(url):
        raise UserError(f"--base-url {url}: expected https, because http would send the key "
                        f"unencrypted; unset {protocol.variable} if the server needs no key")
    return key


def forms_of(key: str) -> re.Pattern[bytes]:
    """Returns a pattern for the key in a body, also as JSON may write it ("\\u002f" for "/").

    JSON inside a string of JSON has several backslashes in these places. The pattern allows 8, so
    that a body of backslashes takes linear time.
    """
    return re.compile("".join(
        r"\\{1,8}(?:u005[cC])?" if c == "\\" else rf"\\{{0,8}}(?:{re.escape(c)}|u(?i:{ord(c):04x}))"
        for c in key).encode())


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
