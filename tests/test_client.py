"""The HTTP client against a local server that misbehaves on purpose."""

import itertools
import json
import threading
import time

import pytest

from fgrlhf.collect import client as module
from fgrlhf.collect.cache import Cache
from fgrlhf.collect.client import Client, Options, Stopped, Unanswered
from fgrlhf.collect.protocol import OPENAI, Reply, endpoint, forms_of, key_of, retry_after
from fgrlhf.data.fields import UserError
from tests.misbehaving import FAULTS, KEY, Server

ASKED = [{"role": "user", "content": "Who? é漢"}]


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")         # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)


def reach(server, cache=None, **options) -> Client:
    base = {"base_url": server.url, "model": "m", "timeout": 5.0, "backoff": 0.001}
    return Client(Options(**base | options), cache)


def well(text="fine"):
    return lambda body, count: ("ok", text)


# What is sent.

def test_ask_sends_anthropics_request_and_reads_its_text_blocks():
    body = {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"},
                        {"type": "text", "text": "b"}], "stop_reason": "max_tokens"}
    with Server(lambda *_: (200, {}, json.dumps(body).encode())) as server:
        assert reach(server, max_tokens=9).ask("sys", ASKED) == Reply("ab", complete=False)
    [seen] = server.seen
    assert seen["path"] == "/v1/messages"
    assert seen["body"] == {"model": "m", "max_tokens": 9, "system": "sys", "messages": ASKED}
    assert seen["headers"]["x-api-key"] == KEY
    assert seen["headers"]["anthropic-version"] == "2023-06-01"
    assert "authorization" not in seen["headers"]


def test_ask_sends_openais_request_and_reads_its_first_choice():
    with Server(well()) as server:
        client = reach(server, api="openai", base_url=server.url + "/v1/")
        assert client.ask("sys", ASKED) == Reply("fine", complete=True)
    [seen] = server.seen
    assert seen["path"] == "/v1/chat/completions"
    assert seen["body"] == {"model": "m",
                            "messages": [{"role": "system", "content": "sys"}, *ASKED]}
    assert seen["headers"]["authorization"] == f"Bearer {KEY}"
    assert "x-api-key" not in seen["headers"]


@pytest.mark.parametrize("message, reason, expected", [
    ({"content": "x"}, "stop", Reply("x", True)), ({"content": "x"}, None, Reply("x", True)),
    ({"content": [{"type": "text", "text": "x"}]}, "stop", Reply("x", True)),
    ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                  {"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}, "stop",
     Reply("xy", True)),
    ({"content": ["x", {"text": "y"}]}, "stop", Reply("xy", True)),
    ({"content": "x"}, "eos", Reply("x", True)), ({"content": "x"}, "length", Reply("x", False)),
    ({"content": "x"}, "MAX_TOKENS", Reply("x", False)),
    ({"content": None, "reasoning_content": "hm"}, "length", Reply("", False)),
    ({"reasoning": "hm"}, "stop", Reply("", True)),
    ({"content": None, "refusal": "no"}, "content_filter", Reply("", False))])
def test_ask_reads_what_servers_make_of_openais_answer_in_one_request(message, reason, expected):
    body = {"choices": [{"message": message} | ({"finish_reason": reason} if reason else {})]}
    with Server(lambda *_: (200, {}, json.dumps(body).encode())) as server:
        assert reach(server, api="openai").ask("s", ASKED) == expected
    assert len(server.seen) == 1


def test_ask_sends_no_key_to_an_own_server_if_there_is_none(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Server(well()) as server:
        reach(server, api="openai").ask("sys", ASKED)
    assert "authorization" not in server.seen[0]["headers"]


# The key.

@pytest.mark.parametrize("url, key, message", [
    ("https://api.openai.com/v1", None, "expected the key in the environment"),
    ("https://api.openai.com/v1", "sk-a\nb", "printable ASCII without spaces"),
    ("https://api.openai.com/v1", "sk-ä", "printable ASCII without spaces"),
    ("http://example.org/v1", "sk-abc", "send the key unencrypted"),
    ("HTTP://example.org/v1", "sk-abc", "send the key unencrypted")])
def test_key_of_refuses_without_a_letter_of_the_key(monkeypatch, url, key, message):
    monkeypatch.delenv("OPENAI_API_KEY")
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=message) as caught:
        key_of(OPENAI, url, own_server=False)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("url", [
    "", " ", "example.org/v1", "localhost:8000/v1", "ftp://example.org", "//example.org", "http://",
    "http:///v1", "https://me:secret@example.org", "https://secret@example.org", "http://[::1",
    "http://h:port", "http://h:99999", "http://h:0", "http://a b", "http://h/v1?key=secret",
    "http://h/v1#secret", "http://h\n", "http://ex\u00e4mple.org", "http://" + "a" * 70 + ".org",
    "http://a..b"])
def test_client_refuses_a_bad_base_url_in_one_line_without_a_secret(url):
    with pytest.raises(UserError, match=r"^--base-url: expected http\(s\)://host") as caught:
        Client(Options(base_url=url, model="m"))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("url, expected", [
    (None, "https://api.openai.com/v1/chat/completions"),
    ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/chat/completions"),
    ("http://[::1]:8000/v1", "http://[::1]:8000/v1/chat/completions"),
    ("https://example.org", "https://example.org/chat/completions")])
def test_endpoint_takes_good_urls(url, expected):
    assert endpoint(OPENAI, url) == expected


def test_ask_removes_a_key_that_the_server_repeats(tmp_path):
    echo = json.dumps({"content": [{"type": "text", "text": f"your key is {KEY}"}],
                       "stop_reason": "end_turn"}).encode()
    with Server(lambda *_: (200, {}, echo)) as server:
        cache = Cache(tmp_path / "c.jsonl")
        assert reach(server, cache).ask("s", ASKED).text == "your key is [key]"
    assert KEY not in (tmp_path / "c.jsonl").read_text()
    for status, error in ((400, Unanswered), (401, UserError), (500, Unanswered)):
        with Server(lambda *_: (status, {}, f"bad key {KEY}".encode())) as server:
            with pytest.raises(error, match=r"bad key \[key\]") as caught:
                reach(server).ask("s", ASKED)
        assert KEY not in repr(caught.value)


@pytest.mark.parametrize("echo", [
    lambda key: json.dumps({"e": key}), lambda key: json.dumps({"e": json.dumps({"e": key})}),
    lambda key: json.dumps({"e": key}).replace("/", "\\/"),
    lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    lambda key: "".join(f"\\u{ord(c):04X}" for c in key),
    lambda key: json.dumps("".join(f"\\u{ord(c):04x}" for c in key))[1:-1]])
def test_ask_removes_a_key_that_the_server_repeats_escaped(monkeypatch, echo):
    key = 'sk-a/b+c"d\\e=='
    monkeypatch.setenv("ANTHROPIC_API_KEY", key)
    body = f"bad key {echo(key)}, sorry".encode()
    with Server(lambda *_: (400, {}, body)) as server:
        with pytest.raises(Unanswered) as caught:
            reach(server).ask("s", ASKED)
    assert "sk-a" not in str(caught.value) and "b+c" not in str(caught.value)
    assert "bad key " in str(caught.value) and "[key]" in str(caught.value)
    assert "sorry" in str(caught.value) and "u00" not in str(caught.value)


def test_ask_reads_an_answer_from_which_an_escaped_key_was_removed(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-a/b")
    echo = b'{"content": [{"type": "text", "text": "n\\nsk-a\\/b."}], "stop_reason": "end_turn"}'
    with Server(lambda *_: (200, {}, echo)) as server:
        assert reach(server).ask("s", ASKED).text == "n\n[key]."


def test_forms_of_a_key_are_found_in_linear_time():
    start = time.monotonic()
    assert forms_of(KEY).search(b"\\" * 2_000_000) is None
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_ask_does_not_follow_a_redirect_with_the_key(status):
    """Python's own handler follows 301 to 303 with a GET that has every header of the request."""
    with Server(well()) as other:
        with Server(lambda *_: (status, {"Location": other.url}, b"")) as server:
            with pytest.raises(UserError, match=f"HTTP {status}"):
                reach(server).ask("s", ASKED)
        assert other.seen == []


# Trying again.

@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("api", ["anthropic", "openai"])
def test_ask_succeeds_after_a_fault(fault, api):
    with Server(lambda body, count: (fault if count < 3 else "ok", "a fine one"), 1.0) as server:
        client = reach(server, api=api, timeout=0.5 if fault == "hang" else 5.0)
        assert client.ask("s", ASKED) == Reply("a fine one", True)
        assert client.requests == 3


def test_ask_is_not_confused_by_a_response_that_is_delivered_twice():
    numbers = itertools.count()
    with Server(lambda *_: ("echo-twice", str(next(numbers)))) as server:
        client = reach(server)
        assert [client.ask("s", ASKED).text for _ in range(4)] == ["0", "1", "2", "3"]


def test_ask_gives_up_after_its_tries_and_says_why():
    with Server(lambda *_: ("500", "")) as server:
        with pytest.raises(Unanswered, match="failed 6 times, the last time: HTTP 500: oops"):
            reach(server).ask("s", ASKED)
        assert len(server.seen) == module.TRIES


def test_ask_ends_a_body_that_comes_too_slowly():
    def drip(handler, *_):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    with Server(well()) as server:
        server._misbehave = drip
        start = time.monotonic()
        with pytest.raises(Unanswered, match="no complete answer after 0.2 s"):
            reach(server, timeout=0.2).ask("s", ASKED)
        assert time.monotonic() - start < 15           # to the end it would take 6 times 5 s


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\nX: "])
def test_ask_ends_headers_that_come_too_slowly(head):
    """A byte every 0.05 s would keep the socket's own time-out from ending the request."""
    def drip(handler, *_):
        handler.wfile.write(head)
        for _ in range(100):
            handler.wfile.write(b"1")
            handler.wfile.flush()
            time.sleep(0.05)
    with Server(well()) as server:
        server._misbehave = drip
        start = time.monotonic()
        with pytest.raises(Unanswered, match="no complete answer after 0.2 s"):
            reach(server, timeout=0.2).ask("s", ASKED)
        assert time.monotonic() - start < 15           # to the end it would take 6 times 5 s
        assert len(server.seen) == module.TRIES


@pytest.mark.parametrize("status", [400, 413, 422])
def test_ask_does_not_repeat_a_request_that_is_itself_wrong(status):
    with Server(lambda *_: (status, {}, b"too long")) as server:
        with pytest.raises(Unanswered, match=f"HTTP {status}: too long"):
            reach(server).ask("s", ASKED)
        assert len(server.seen) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_ask_stops_at_a_wrong_key_model_or_url(status):
    with Server(lambda *_: (status, {}, b"no")) as server:
        with pytest.raises(UserError, match="check --base-url, --model and ANTHROPIC_API_KEY"):
            reach(server).ask("s", ASKED)
        assert len(server.seen) == 1


@pytest.mark.parametrize("value, seconds", [
    (None, 0), ("", 0), ("soon", 0), ("-5", 0), ("nan", 0), ("2.5", 2.5), ("120", 120),
    ("Thu, 01 Jan 1970 00:20:00 GMT", 200), ("Thu, 01 Jan 1970 00:00:00 GMT", 0)])
def test_retry_after_reads_seconds_and_dates(value, seconds):
    assert retry_after(value, now=1000.0) == seconds


def test_ask_waits_for_retry_after_in_every_thread():
    def behave(body, count):
        first = not behave.told
        behave.told = True
        return (429, {"Retry-After": "0.6"}, b"") if first else ("ok", "fine")
    behave.told = False
    with Server(behave) as server:
        client = reach(server)
        first = threading.Thread(target=client.ask, args=("s", ASKED))
        first.start()
        while client._not_before == 0:
            time.sleep(0.005)
        client.ask("other", ASKED)                     # got no 429, but waits too
        first.join()
    assert [s["time"] >= client._not_before for s in server.seen] == [False, True, True]


def test_ask_gives_up_a_question_if_the_server_asks_to_wait_for_hours():
    with Server(lambda *_: (429, {"Retry-After": "7200"}, b"quota")) as server:
        with pytest.raises(Unanswered, match="the server asks to wait 7200 s"):
            reach(server).ask("s", ASKED)
        assert len(server.seen) == 1


# Budget, cache, many at once.

def test_ask_sends_no_more_than_max_requests_tries_included():
    with Server(lambda body, count: ("ok" if body["system"] == "a" else "500", "x")) as server:
        client = reach(server, max_requests=3)
        client.ask("a", ASKED)
        with pytest.raises(Stopped, match="--max-requests 3"):
            client.ask("b", ASKED)
        assert len(server.seen) == client.requests == 3


def test_cache_answers_the_same_question_and_no_other(tmp_path):
    path, numbers = tmp_path / "c.jsonl", itertools.count()
    with Server(lambda *_: ("ok", str(next(numbers)))) as server:
        for round in range(2):                             # the second round reads from disk
            cache = Cache(path)
            asked = [reach(server, cache, **o).ask(system, ASKED).text for system, o in (
                ("a", {}), ("b", {}), ("a", {"model": "other"}), ("a", {"max_tokens": 5}),
                ("a", {"api": "openai"}), ("a", {}))]
            cache.close()
            assert asked == ["0", "1", "2", "3", "4", "0"]
    assert len(server.seen) == 5


def test_cache_survives_a_torn_line_and_refuses_a_file_of_something_else(tmp_path):
    path = tmp_path / "c.jsonl"
    cache = Cache(path)
    cache.put("k", Reply("é", True))
    cache.close()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:25])
    cache = Cache(path)
    assert cache.get("k") == Reply("é", True) and path.read_bytes() == whole
    cache.close()
    path.write_text('{"id": 3}\n')
    with pytest.raises(UserError, match="c.jsonl:1: expected key, text and complete"):
        Cache(path)


@pytest.mark.parametrize("failures", [0, 1, 4])
def test_equal_questions_at_the_same_time_are_asked_one_after_another(tmp_path, failures):
    """The first answer serves those that wait. A failure serves nobody: the next one asks."""
    def behave(body, count):
        time.sleep(0.1)                                    # the others come meanwhile
        return (400, {}, b"no") if count <= failures else ("ok", "fine")

    with Server(behave) as server:
        client = reach(server, Cache(tmp_path / "c.jsonl"), workers=4)
        found = [got for _, got in client.gather(range(4), lambda _: client.ask("s", ASKED))]
        assert sum(isinstance(got, Unanswered) for got in found) == failures
        assert found.count(Reply("fine", True)) == 4 - failures
        assert len(server.seen) == client.requests == min(failures + 1, 4)
        assert client.cached == max(3 - failures, 0)


def test_equal_questions_that_wait_end_when_the_client_stops(tmp_path):
    def behave(*_):
        threading.Timer(0.3, client.stop).start()
        return 429, {"Retry-After": "300"}, b""

    with Server(behave) as server:
        client, start = reach(server, Cache(tmp_path / "c.jsonl"), workers=4), time.monotonic()
        assert list(client.gather(range(4), lambda _: client.ask("s", ASKED))) == []
        assert len(server.seen) == 1 and time.monotonic() - start < 60


def test_gather_yields_failures_and_gives_up_after_many_in_a_row():
    with Server(lambda body, count: (400, {}, b"no")) as server:
        client = reach(server, workers=2)
        got = list(client.gather(range(100), lambda i: client.ask(str(i), ASKED)))
    assert module.GIVE_UP <= len(got) < module.GIVE_UP + 10
    assert all(isinstance(result, Unanswered) for _, result in got)


def test_gather_asks_workers_at_once_and_loses_none():
    gate = threading.Barrier(4)

    def call(i):
        gate.wait(5)                                       # opens only for four at once
        return i * i
    with Server(well()) as server:
        assert sorted(reach(server, workers=4).gather(range(20), call)) == [
            (i, i * i) for i in range(20)]


def test_gather_raises_a_user_error_and_stops_the_rest():
    with Server(lambda *_: (401, {}, b"")) as server:
        client = reach(server, workers=2)
        with pytest.raises(UserError, match="HTTP 401"):
            list(client.gather(range(200), lambda i: client.ask(str(i), ASKED)))
        assert len(server.seen) < 20


def test_gather_that_ends_wakes_the_threads_that_wait_to_try_again():
    """One question must wait 5 minutes; another one shows that the key is wrong."""
    def behave(body, count):
        return (429, {"Retry-After": "300"}, b"") if body["system"] == "0" else (401, {}, b"")

    def call(i, client):
        while i == 1 and not client._not_before:           # after the 429 of the other one
            time.sleep(0.005)
        client._not_before = client._not_before if i == 0 else 0.0
        return client.ask(str(i), ASKED)

    with Server(behave) as server:
        client, start = reach(server, workers=2), time.monotonic()
        with pytest.raises(UserError, match="HTTP 401"):
            list(client.gather(range(2), lambda i: call(i, client)))
        assert time.monotonic() - start < 5
