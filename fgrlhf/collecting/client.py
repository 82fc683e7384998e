"""A client for language models over HTTP: Anthropic's Messages API, OpenAI's chat API and its like.

    client.ask(system, messages) -> Reply(text, complete)

One question is one POST on a connection of its own (a late or doubled answer can meet no other
question), tried again with exponential backoff after 408, 409, 429, 5xx, a broken connection, a
time-out, or a body that is no answer; a Retry-After holds back every thread. Answers are kept in a
cache keyed by the request: what was paid for once is not asked again, killed or not.

The key is read from the environment and nowhere else. It leaves the program in one header, never
over plain HTTP to another machine, never to where a redirect points; should a server echo it, it is
struck from the body before anybody reads that.
"""

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from fgrlhf.collecting.cache import Cache
from fgrlhf.collecting.protocol import PROTOCOLS, Reply, is_local, key_of, retry_after
from fgrlhf.config import UserError, arg

TRIES, LONGEST_PAUSE = 6, 600.0                   # tries a question; seconds a server may ask for
LARGEST_BODY, GIVE_UP = 8 << 20, 10               # bytes; failed questions in a row
AGAIN, WRONG_SETUP = (408, 409, 425, 429), (401, 403, 404)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line's part in reaching a model."""

    api: str = arg("anthropic", choices=("anthropic", "openai"),
                   help="llm: the protocol; openai is spoken by many other servers, too")
    base_url: str | None = arg(None, help="llm: another server than the protocol's own")
    model: str | None = arg(None, help="llm: the model's name there")
    max_tokens: int = arg(4096, least=1, help="llm: longest answer, tokens (anthropic)")
    max_requests: int | None = arg(None, least=1, help="llm: send at most N requests, then stop")
    workers: int = arg(4, least=1, help="llm: requests under way at once")
    timeout: float = arg(120.0, least=0.1, help="llm: seconds an answer may take")
    backoff: float = arg(1.0, least=0, help="llm: seconds before a request is tried again; doubles "
                                            "each time; Retry-After is waited for besides")


class _Again(Exception):
    """This request failed in a way that another try may mend."""


class Unanswered(Exception):
    """No answer to this question now: asking again later may help."""


class Stopped(Exception):
    """No more questions in this run: the budget is spent, or somebody has called `stop`."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None                               # the 3xx then counts as an error


class Client:
    """Asks one model; thread-safe. `requests` counts what was sent, `cached` what was not."""

    def __init__(self, options: Options, cache: Cache | None = None):
        if not options.model:
            raise UserError("llm: expected --model beside it, the name the server knows it by")
        self.cache, self.model, self.max_tokens = cache, options.model, options.max_tokens
        self.max_requests, self.workers = options.max_requests, options.workers
        self.timeout, self.backoff = options.timeout, options.backoff
        self.protocol = PROTOCOLS[options.api]
        self.url = (options.base_url or self.protocol.base_url).rstrip("/") + self.protocol.path
        self._key = key_of(self.protocol, self.url, options.base_url is not None)
        self._opener = urllib.request.build_opener(_NoRedirect)
        if is_local(self.url):                    # a proxy would see the key in the clear
            self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
        self._mutex, self._stopping = threading.Lock(), threading.Event()
        self._not_before = 0.0                    # time.monotonic() of a Retry-After
        self.requests = self.cached = 0
        self.stopped_by = ""                      # why no more questions are sent, where that is so

    def body(self, system: str, messages: list[dict]) -> dict:
        """What `ask` sends, headers aside."""
        return self.protocol.body(self.model, system, messages, self.max_tokens)

    def stop(self) -> None:
        """Let every waiting or later `ask` end with Stopped; those under way still count."""
        self._stopping.set()

    def ask(self, system: str, messages: list[dict]) -> Reply:
        """The model's answer, from the cache or the server.

        Raises Unanswered after TRIES failures or a 4xx about this very request, Stopped when no
        request may be sent any more, UserError for a wrong key, model or URL.
        """
        body = self.body(system, messages)
        key = Cache.key(self.url, body)
        if self.cache and (known := self.cache.get(key)):
            with self._mutex:
                self.cached += 1
            return known
        for attempt in range(TRIES):
            try:
                reply = self._post(json.dumps(body).encode())
            except _Again as failure:
                problem = str(failure)
                if attempt < TRIES - 1:
                    self._pause(self.backoff * 2 ** attempt * random.uniform(0.5, 1))
                continue
            if self.cache:
                self.cache.put(key, reply)
            return reply
        raise Unanswered(f"{TRIES} tries, the last: {problem}")

    def gather(self, items: Iterable, call: Callable) -> Iterator[tuple]:
        """(item, call(item)) as they are done, `workers` at once; of an Unanswered one the error.

        GIVE_UP of those in a row end it, as Stopped does; any other exception ends it and is
        raised. What was under way then still reaches the cache.
        """
        in_a_row = 0
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(call, item): item for item in items}
            try:
                for future in as_completed(futures):
                    try:
                        result, in_a_row = future.result(), 0
                    except Stopped:
                        continue
                    except Unanswered as error:
                        result, in_a_row = error, in_a_row + 1
                    if in_a_row == GIVE_UP:
                        self.stopped_by = f"{GIVE_UP} questions in a row went unanswered"
                        self.stop()
                    yield futures[future], result
            except BaseException:
                self.stop()                       # the rest end as Stopped, at once
                raise

    def _pause(self, seconds: float) -> None:
        """Wait, and until a Retry-After is over; Stopped when that is called off."""
        until = time.monotonic() + seconds
        while (left := max(until, self._not_before) - time.monotonic()) > 0:
            if self._stopping.wait(left):
                break
        if self._stopping.is_set():
            raise Stopped("stopped")

    def _post(self, data: bytes) -> Reply:
        """One request. Raises _Again where another try may help; for the rest see `ask`."""
        self._pause(0)
        with self._mutex:
            if self.requests == self.max_requests:
                self.stopped_by = f"--max-requests {self.max_requests} are sent"
                raise Stopped(self.stopped_by)
            self.requests += 1
        request = urllib.request.Request(self.url, data, method="POST", headers={
            "Content-Type": "application/json"} | self.protocol.headers(self._key))
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                raw = self._read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error, deadline)
        except (OSError, http.client.HTTPException) as error:      # a time-out, too
            raise _Again(self._clean(repr(error))) from None
        try:
            return self.protocol.reply(json.loads(raw.decode("utf-8")))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise _Again(f"no answer in the body ({type(error).__name__})") from None

    def _read(self, response, deadline: float) -> bytes:
        """The whole body, the key struck out; TimeoutError, or _Again where it was cut short."""
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end after {self.timeout:g} s")
            if size > LARGEST_BODY:
                raise _Again(f"a body of more than {LARGEST_BODY} bytes")
        if getattr(response, "length", None):
            raise _Again(f"the body ended {response.length} bytes early")
        data = b"".join(parts)
        return data.replace(self._key.encode(), b"[key]") if self._key else data

    def _refused(self, error: urllib.error.HTTPError, deadline: float):
        """Raise what an HTTP error means."""
        try:
            said = self._read(error, deadline)
        except (OSError, http.client.HTTPException, _Again):
            said = b""
        problem = f"HTTP {error.code}: " + " ".join(said.decode(errors="replace").split())[:200]
        if error.code in AGAIN or error.code >= 500:
            wait = retry_after(error.headers.get("Retry-After"), time.time())
            if wait > LONGEST_PAUSE:
                raise Unanswered(f"{problem} (the server asks to wait {wait:.0f} s)")
            with self._mutex:
                self._not_before = max(self._not_before, time.monotonic() + wait)
            raise _Again(problem)
        if error.code in WRONG_SETUP or error.code < 400:
            raise UserError(f"{self.url}: {problem or 'a redirect'}; check --base-url, --model and "
                            f"{self.protocol.variable}")
        raise Unanswered(problem)

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text
