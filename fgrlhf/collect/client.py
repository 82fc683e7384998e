"""Asks language models over HTTP, by Anthropic's Messages API or OpenAI's chat API.

    client.ask(system, messages) -> Reply(text, complete)

Each question is one POST on a connection of its own, so a late or doubled answer cannot reach
another question. The client tries again, with exponential backoff, after 408, 409, 425, 429, 5xx, a
broken connection, a time-out, or a body without an answer. A Retry-After makes every thread wait.
Answers go into a cache under the hash of the request: no question is paid for twice, even after a
kill, or when equal questions come at the same time.

The key comes from the environment only. It is sent in one header, never over plain HTTP to another
machine and never to the target of a redirect. If a server repeats the key in a body, as text or
escaped as in JSON, the key is removed before anything reads the body.
"""

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from fgrlhf.collect.cache import Cache
from fgrlhf.collect.deadline import Http, Https, within
from fgrlhf.collect.protocol import (
    PROTOCOLS, Reply, endpoint, forms_of, is_local, key_of, retry_after)
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import arg

TRIES = 6                                         # per question
LONGEST_PAUSE = 600.0                             # seconds that a server may ask to wait
LARGEST_BODY = 8 << 20                            # bytes
GIVE_UP = 10                                      # failed questions in a row
AGAIN, WRONG_SETUP = (408, 409, 425, 429), (401, 403, 404)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A language model as editor or judge (--editor llm, --judge llm)"""

    api: str = arg("anthropic", choices=("anthropic", "openai"),
                   help="protocol; most local servers understand openai")
    base_url: str | None = arg(None, help="URL of another server than the protocol's own")
    model: str | None = arg(None, help="name of the model on the server")
    max_tokens: int = arg(4096, least=1, help="longest answer in tokens (anthropic only)")
    max_requests: int | None = arg(None, least=1, help="stop after N requests")
    workers: int = arg(4, least=1, help="number of requests at the same time")
    timeout: float = arg(120.0, least=0.1, help="seconds to wait for a whole answer")
    backoff: float = arg(1.0, least=0, help="seconds before the second try; doubles with each try; "
                                            "a server's Retry-After is obeyed too")


class _Again(Exception):
    """A request failed, and another try may succeed."""


class Unanswered(Exception):
    """A question got no answer now; asking again later may help."""


class Stopped(Exception):
    """No more questions in this run: the budget is used up, or `stop` was called."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None                               # the 3xx then raises HTTPError


class Client:
    """Asks one model; thread-safe. `requests` counts requests, `cached` answers from the cache."""

    def __init__(self, options: Options, cache: Cache | None = None):
        if not options.model:
            raise UserError("language model: expected --model, the model's name on the server, got "
                            "nothing; add it")
        self.cache, self.model, self.max_tokens = cache, options.model, options.max_tokens
        self.max_requests, self.workers = options.max_requests, options.workers
        self.timeout, self.backoff = options.timeout, options.backoff
        self.protocol = PROTOCOLS[options.api]
        self.url = endpoint(self.protocol, options.base_url)
        self._key = key_of(self.protocol, self.url, options.base_url is not None)
        # A proxy would see the key unencrypted on its way to a local server.
        proxies = [urllib.request.ProxyHandler({})] if is_local(self.url) else []
        self._opener = urllib.request.build_opener(_NoRedirect, Http, Https, *proxies)
        self._mutex, self._stopping = threading.Lock(), threading.Event()
        self._asking = defaultdict(threading.Lock)    # by key of a question; held while it is asked
        self._not_before = 0.0                    # time.monotonic() when a Retry-After is over
        self.requests = self.cached = 0
        self.stopped_by = ""                      # why no more questions are sent; "" if they are

    def stop(self) -> None:
        """Ends every waiting or later `ask` with Stopped. Requests under way still complete."""
        self._stopping.set()

    def ask(self, system: str, messages: list[dict]) -> Reply:
        """Returns the model's answer, from the cache or the server.

        Raises Unanswered after TRIES failures or a 4xx about this request, Stopped when no more
        requests may be sent, and UserError for a wrong key, model or URL.
        """
        body = self.protocol.body(self.model, system, messages, self.max_tokens)
        if not self.cache:
            return self._answer(body)
        key = Cache.key(self.url, body)
        with self._mutex:
            asking = self._asking[key]
        with asking:                              # if the first one fails, the next one asks
            if known := self.cache.get(key):
                with self._mutex:
                    self.cached += 1
                return known
            reply = self._answer(body)
            self.cache.put(key, reply)
            return reply

    def _answer(self, body: dict) -> Reply:
        """Asks the server up to TRIES times. Raises what `ask` raises."""
        for attempt in range(TRIES):
            try:
                return self._post(json.dumps(body).encode())
            except _Again as failure:
                problem = str(failure)
                if attempt < TRIES - 1:
                    self._pause(self.backoff * 2 ** attempt * random.uniform(0.5, 1))
        raise Unanswered(f"failed {TRIES} times, the last time: {problem}")

    def gather(self, items: Iterable, call: Callable) -> Iterator[tuple]:
        """Yields (item, call(item)) as the calls end, `workers` at the same time.

        If a call raises Unanswered, yields (item, the error); GIVE_UP of them in a row end the
        questions. A call that raises Stopped yields nothing. Any other exception ends the questions
        and is raised. Requests under way at the end still reach the cache.
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
                        self.stopped_by = f"{GIVE_UP} questions in a row got no answer"
                        self.stop()
                    yield futures[future], result
            except BaseException:
                self.stop()                       # the others end with Stopped at once
                raise

    def _pause(self, seconds: float) -> None:
        """Waits `seconds`, and until a Retry-After is over. Raises Stopped after `stop`."""
        until = time.monotonic() + seconds
        while (left := max(until, self._not_before) - time.monotonic()) > 0:
            if self._stopping.wait(left):
                break
        if self._stopping.is_set():
            raise Stopped("stopped")

    def _post(self, data: bytes) -> Reply:
        """Sends one request. Raises _Again if another try may help, and otherwise as `ask`."""
        self._pause(0)
        with self._mutex:
            if self.requests == self.max_requests:
                self.stopped_by = f"all --max-requests {self.max_requests} are sent"
                raise Stopped(self.stopped_by)
            self.requests += 1
        request = urllib.request.Request(self.url, data, method="POST", headers={
            "Content-Type": "application/json"} | self.protocol.headers(self._key))
        try:
            with within(request, self.timeout):
                raw = self._exchange(request)
        except (OSError, http.client.HTTPException) as error:      # time-outs included
            if time.monotonic() > request.deadline:
                raise _Again(f"no complete answer after {self.timeout:g} s") from None
            raise _Again(self._without_key(repr(error).encode()).decode()) from None
        try:
            return self.protocol.reply(json.loads(raw.decode("utf-8")))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise _Again(f"the body holds no answer ({type(error).__name__})") from None

    def _exchange(self, request: urllib.request.Request) -> bytes:
        """Returns the body of the response. Raises the exception that fits an HTTP error."""
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._read(response, request.deadline)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error, request.deadline)

    def _read(self, response, deadline: float) -> bytes:
        """Reads the whole body and removes the key from it.

        Raises TimeoutError after `deadline`, and _Again if the body is too long or was cut off.
        """
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > LARGEST_BODY:
                raise _Again(f"the body is longer than {LARGEST_BODY} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError                    # the rest was cut off
        if getattr(response, "length", None):
            raise _Again(f"the body ended {response.length} bytes early")
        return self._without_key(b"".join(parts))

    def _refused(self, error: urllib.error.HTTPError, deadline: float):
        """Raises the exception that fits an HTTP error."""
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

    def _without_key(self, data: bytes) -> bytes:
        return forms_of(self._key).sub(b"[key]", data) if self._key else data
