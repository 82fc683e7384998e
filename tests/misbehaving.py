"""A local server for both protocols that makes faults on request.

Each fault is one that real servers and networks make. `behave(request, count)` chooses the answer:
`request` is the decoded body, and `count` says how often the same request has come.
"""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-0123456789abcdef-never-to-be-seen"
FAULTS = ("429", "500", "529", "hang", "truncated", "malformed", "encoding", "twice", "drop",
          "no-answer", "html")                    # asking again helps against each


def anthropic(text: str, stop: str = "end_turn") -> bytes:
    return json.dumps({"content": [{"type": "text", "text": text}], "stop_reason": stop},
                      ensure_ascii=False).encode()


def openai(text: str, stop: str = "stop") -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text},
                                    "finish_reason": stop}]}, ensure_ascii=False).encode()


class Server:
    """behave(request, count) -> ("ok", text), (fault, text), or (status, headers, body bytes)."""

    def __init__(self, behave, hang_seconds: float = 3.0):
        self.behave, self.hang_seconds = behave, hang_seconds
        self.seen: list[dict] = []                # {"path", "headers", "body", "time"}
        self.count, self._mutex = Counter(), threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                owner._answer(self)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *_):           # the tests let clients go away
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def _answer(self, handler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        body = json.loads(raw)
        with self._mutex:
            self.count[raw] += 1
            self.seen.append({"path": handler.path, "body": body, "time": time.monotonic(),
                              "headers": {k.lower(): v for k, v in handler.headers.items()}})
            what, *rest = self.behave(body, self.count[raw])
        wrap = anthropic if handler.path.endswith("/messages") else openai
        if isinstance(what, int):
            self._send(handler, what, *rest)
        else:
            self._misbehave(handler, what, wrap(rest[0]))

    def _misbehave(self, handler, fault: str, good: bytes) -> None:
        if fault == "429":
            self._send(handler, 429, {"Retry-After": "0.05"}, b'{"error": "slow down"}')
        elif fault in ("500", "529"):
            self._send(handler, int(fault), {}, f"oops {KEY}".encode())
        elif fault == "hang":
            time.sleep(self.hang_seconds)
            handler.close_connection = True
        elif fault == "truncated":                # fewer bytes than announced
            self._send(handler, 200, {"Content-Length": str(len(good))}, good[:len(good) // 2])
            handler.close_connection = True
        elif fault == "malformed":
            self._send(handler, 200, {}, good[:-2])
        elif fault == "encoding":
            self._send(handler, 200, {}, good.decode().replace("a", "\u00e4").encode("latin-1"))
        elif fault == "twice":                    # delivered twice in one body
            self._send(handler, 200, {}, good + good)
        elif fault == "drop":
            handler.close_connection = True
        elif fault == "no-answer":
            self._send(handler, 200, {}, b'{"content": [], "choices": []}')
        elif fault == "html":
            self._send(handler, 200, {}, b"<html>Bad gateway</html>")
        else:
            self._send(handler, 200, {}, good)
            if fault == "echo-twice":             # the whole response twice on the wire
                self._send(handler, 200, {}, good)

    def _send(self, handler, status: int, headers: dict, body: bytes) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
        handler.wfile.flush()
