"""The human editor: one page on the loopback interface (page/), behind a small strict server.

What may come in, and what is refused before anything is done:

    address   http://127.0.0.1:PORT/TOKEN/ with a token new in each run, printed on stderr alone;
              every other path is 404. Paths are compared, never opened: no folder is behind them.
    Host      must be this server's address or a name that it was given: a foreign name pointed at
              127.0.0.1 (DNS rebinding) is refused.
    Origin    must be this page's own on every POST, and the body JSON: neither a form nor a script
              of another site gets in.
    body      at most LARGEST bytes, its length told in advance.

Texts reach the page as JSON and are set there as text, never as markup; the page's policy forbids
inline script, other origins, frames and forms besides.
"""

import hmac
import ipaddress
import json
import secrets
import socket
import socketserver
import sys
import threading
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from fgrlhf.collecting.change import Change, measure
from fgrlhf.collecting.desk import PROMPT, Conflict, Desk, Who
from fgrlhf.collecting.segments import segments
from fgrlhf.collecting.store import Store
from fgrlhf.collecting.tasks import Task
from fgrlhf.config import UserError
from fgrlhf.fields import check

LARGEST = 1 << 20                                 # bytes of a request's body
PAGE = Path(__file__).parent / "page"
INSTRUCTION = Path(__file__).parents[1] / "prompts" / f"{PROMPT}.txt"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy":
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'",
    "Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin"}


@dataclass(frozen=True)
class Options:
    """What the command line says about the page."""

    max_change: float                             # largest share of changed words, in (0, 1]
    host: str = "127.0.0.1"
    port: int = 0                                 # 0: any free one
    allow_remote: bool = False                    # let other machines in, with a host for them
    annotator: str | None = None                  # None: the page asks


@dataclass(frozen=True)
class Request:
    """What the page says with every action; each action reads what concerns it."""

    annotator: str = ""
    tab: str = ""
    page: str = ""
    id: str = ""
    text: str = ""
    reason: str = ""

    @property
    def who(self) -> Who:
        return check(Who, {"annotator": self.annotator, "tab": self.tab, "page": self.page},
                     "request")


class Refusal(Exception):
    """A request that is answered with this status and a reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Actions:
    """What the page can ask for; each action takes a Request and returns a JSON object."""

    def __init__(self, desk: Desk, options: Options):
        self.desk, self.options, self.finished = desk, options, threading.Event()
        self.table = {action.__name__: action for action in (
            self.start, self.next, self.save, self.leave, self.accept, self.skip, self.undo,
            self.finish)}

    def start(self, request: Request) -> dict:
        """Before the annotator is known."""
        return {"annotator": self.options.annotator, "limit": self.options.max_change,
                "instruction": INSTRUCTION.read_text(encoding="utf-8")}

    def next(self, request: Request) -> dict:
        return self._view(request, self.desk.take(request.who))

    def save(self, request: Request) -> dict:
        change = self.desk.save(request.who, request.id, request.text)
        return self._change(request.id, request.text, change)

    def leave(self, request: Request) -> dict:
        self.desk.save(request.who, request.id, request.text, leave=True)
        return {}

    def accept(self, request: Request) -> dict:
        self.desk.accept(request.who, request.id, request.text)
        return self.next(request)

    def skip(self, request: Request) -> dict:
        self.desk.skip(request.who, request.id, request.text, request.reason)
        return self.next(request)

    def undo(self, request: Request) -> dict:
        held = self.desk.undo(request.who)
        if held is None:
            raise UserError("There is nothing to undo.")
        return self._view(request, held)

    def finish(self, request: Request) -> dict:
        """End the program, once every record is done."""
        progress = self.desk.progress(request.annotator)
        if progress["done"] < progress["total"]:
            raise Conflict("Some records are still open.")
        self.finished.set()
        return {}

    def _view(self, request: Request, held: tuple[Task, str] | None) -> dict:
        """The progress, and the record to show, if any."""
        view = self.desk.progress(request.annotator) | {"record": None}
        if held:
            task, text = held
            shown = {name: value for name, value in asdict(task).items() if name != "spans"}
            change = self._change(task.id, text, measure(task.rejected, text))
            view["record"] = shown | {"text": text, "change": change}
        return view

    def _change(self, id: str, text: str, change: Change) -> dict:
        words = change.alignment
        return {"segments": segments(self.desk.tasks[id].rejected, text, change),
                "changed": change.distance, "share": change.share, "kept": len(words.pairs),
                "deleted": sum(words.original_changed), "inserted": sum(words.edited_changed)}


class Server(socketserver.ThreadingTCPServer):
    """The socket, and what a Handler needs to know."""

    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

    def __init__(self, desk: Desk, options: Options):
        """Raises UserError when the address is not to be had, or would let other machines in."""
        if not (_is_loopback(options.host) or options.allow_remote):
            raise UserError(f"--host {options.host}: other machines could read and write the "
                            "records; keep 127.0.0.1, or add --allow-remote")
        self.options, self.actions = options, Actions(desk, options)
        self.files = {path.name: path.read_bytes() for path in PAGE.iterdir()}
        self.token = secrets.token_urlsafe(16)
        self.address_family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        try:
            super().__init__((options.host, options.port), Handler)
        except OSError as error:
            raise UserError(f"--host {options.host} --port {options.port}: cannot be served "
                            f"({error.strerror or error}); choose another port") from None
        self.port = self.server_address[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        self.url = f"http://{host}:{self.port}/{self.token}/"

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server."""
        name, _, port = host.lower().rpartition(":")
        name = name.removeprefix("[").removesuffix("]")
        if port != str(self.port):
            return False
        if name == "localhost" or _is_loopback(name):
            return True
        names = (self.options.host.lower(), socket.gethostname().lower())
        return self.options.allow_remote and (_is_address(name) or name in names)

    def handle_error(self, request, client_address) -> None:
        """A page that goes away in the middle of a request is nothing to report."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 120                                 # seconds that a silent connection is kept
    server: Server

    def do_GET(self) -> None:
        try:
            name = self._checked_path() or "index.html"
            if name not in self.server.files:
                raise Refusal(404, "no such page")
            self._send(200, self.server.files[name], TYPES[Path(name).suffix])
        except Refusal as refusal:
            self._refuse(refusal)

    def do_POST(self) -> None:
        try:
            action = self.server.actions.table.get(self._checked_path())
            if action is None:
                raise Refusal(404, "no such action")
            try:
                result, status = action(self._request()), 200
            except Conflict as conflict:
                result, status = {"error": str(conflict)}, 409
            except UserError as error:
                result, status = {"error": str(error)}, 422
            self._send(status, json.dumps(result).encode(), "application/json")
        except Refusal as refusal:
            self._refuse(refusal)

    def _checked_path(self) -> str:
        """What follows the token, of a request that may come in."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            raise Refusal(403, "unknown host")
        if origins != [f"http://{hosts[0]}"] and (origins or self.command != "GET"):
            raise Refusal(403, "another site's request")
        token, slash, name = self.path.removeprefix("/").partition("/")
        if not (slash and hmac.compare_digest(token.encode(), self.server.token.encode())):
            raise Refusal(404, "open the address that fgrlhf.collect printed")
        return name

    def _request(self) -> Request:
        length, kind = self.headers.get("Content-Length", ""), self.headers.get_content_type()
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise Refusal(411, "expected Content-Length")
        if int(length) > LARGEST:
            raise Refusal(413, f"more than {LARGEST} bytes")
        if kind != "application/json":
            raise Refusal(415, "expected JSON")
        try:
            return check(Request, json.loads(self.rfile.read(int(length))), "request")
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"bad request: {error}") from None

    def _refuse(self, refusal: Refusal) -> None:
        """Answer and hang up: the body, if any, is not read."""
        self.close_connection = True
        self._send(refusal.status, f"{refusal}\n".encode(), "text/plain")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        return "fgrlhf"

    def log_message(self, *_) -> None:
        """Silent: the paths hold the token."""


def serve(tasks: list[Task], store: Store, options: Options) -> None:
    """Serve the page until all is done and a page says so, or the user stops the program."""
    with Server(Desk(tasks, store, options.max_change), options) as server:
        if not _is_loopback(options.host):
            print(f"warning: {options.host}: whoever learns this address on the network can read "
                  "and edit the records; nothing is encrypted", file=sys.stderr)
        print(f"Edit at {server.url}\nStop with Ctrl-C: nothing is lost, the next run goes on.",
              file=sys.stderr, flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            server.actions.finished.wait()
        except KeyboardInterrupt:
            pass
        server.shutdown()


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _is_loopback(name: str) -> bool:
    return name == "localhost" or _is_address(name) and ipaddress.ip_address(name).is_loopback
