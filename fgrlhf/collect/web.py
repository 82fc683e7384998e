"""A small, strict server for one page. It checks these things before anything else:

    address   http://HOST:PORT/TOKEN/ with a new token in each run; every other path gives 404. The
              server compares paths with the names of the page's files and never opens a path.
    Host      must be this server's address, or a name that the server was given. This refuses a
              foreign name that points at 127.0.0.1 (DNS rebinding).
    Origin    must be this page's own on every POST, and the body must be JSON. This refuses the
              forms and scripts of other sites.
    body      has at most LARGEST bytes, or more for longer responses, and its length is declared
              in advance.

A forwarded port or a proxy gives the page another address. --public-url names it: exactly that Host
and that Origin are then allowed too, and the path of that URL may precede the token. A proxy may
pass the Host on or replace it by this server's own, and may cut the path off or keep it.

The page's policy forbids inline scripts, markup made from text, other origins, frames and forms.
"""

import hmac
import ipaddress
import json
import secrets
import socket
import socketserver
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from fgrlhf.data.fields import UserError

LARGEST = 1 << 20                                 # bytes of a request's body
DEFAULT_PORTS = {"http": 80, "https": 443}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy":
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'",
    "Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin"}
Action = Callable[[object], tuple[int, dict]]     # decoded JSON -> status, JSON object


class Refusal(Exception):
    """A request that is refused with an HTTP status and a reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Address:
    """A --public-url: `origin`, as browsers send it, `hosts` and `path`, which ends in "/".

    Raises UserError for text that is no such URL.
    """

    def __init__(self, url: str):
        try:
            parts = urllib.parse.urlsplit(url)
            port, host = parts.port, parts.hostname
            good = (parts.scheme in DEFAULT_PORTS and host and port != 0
                    and not set("@%\\") & set(parts.netloc) and not set("?#") & set(url)
                    and all("!" <= c <= "~" for c in url))
        except ValueError:
            good = False
        if not good:
            raise UserError(f"--public-url {url!r}: expected http(s)://host[:port][/path], got "
                            "another form; copy the address from the browser, without the token")
        name, usual = f"[{host}]" if ":" in host else host, DEFAULT_PORTS[parts.scheme]
        self.hosts = {f"{name}:{port or usual}"} | ({name} if port in (None, usual) else set())
        self.origin = f"{parts.scheme}://{min(self.hosts, key=len)}"
        self.path = parts.path.rstrip("/") + "/"
        self.is_private = parts.scheme == "https" or is_loopback(host)


class Server(socketserver.ThreadingTCPServer):
    """The socket, and the data that each Handler needs."""

    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

    def __init__(self, folder: Path, actions: dict[str, Action], host: str, ports: Sequence[int],
                 allow_remote: bool, public: Address | None = None, largest: int = LARGEST):
        """Reads the files of the page from `folder`, and takes the first free one of `ports`.

        largest: bytes of a request's body. Raises UserError if no port is free, or if the address
        would let other machines in and `allow_remote` is False.
        """
        if not (is_loopback(host) or allow_remote):
            raise UserError(f"--host {host}: expected an address of this machine only, because "
                            "others could read and write the records; keep 127.0.0.1, or add "
                            "--allow-remote")
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.actions, self.host, self.allow_remote = actions, host, allow_remote
        self.public, self.largest = public, largest
        self.token = secrets.token_urlsafe(16)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for port in ports:
            try:
                super().__init__((host, port), Handler)
                break
            except (OSError, OverflowError) as error:
                reason = error
        else:
            raise UserError(f"--host {host} --port {port}: cannot be used ({reason}); "
                            "choose another address")
        self.port = self.server_address[1]
        name = f"[{host}]" if ":" in host else host
        self.own_url = f"http://{name}:{self.port}/{self.token}/"
        self.url = f"{public.origin}{public.path}{self.token}/" if public else self.own_url

    def origins(self, host: str) -> set[str]:
        """Returns the allowed values of Origin for a Host header; none for a foreign Host."""
        own = {f"http://{host}"} if self._is_own(host) else set()
        if self.public and (own or host.lower() in self.public.hosts):
            own.add(self.public.origin)
        return own

    def _is_own(self, host: str) -> bool:
        """True if a Host header names this server's own address."""
        name, _, port = host.lower().rpartition(":")
        name = name.removeprefix("[").removesuffix("]")
        if port != str(self.port):
            return False
        if name == "localhost" or is_loopback(name):
            return True
        names = (self.host.lower(), socket.gethostname().lower())
        return self.allow_remote and (_is_address(name) or name in names)

    def handle_error(self, request, client_address) -> None:
        """Ignores a page that closes its connection in the middle of a request."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 120                                 # seconds until a silent connection is closed
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
            action = self.server.actions.get(self._checked_path())
            if action is None:
                raise Refusal(404, "no such action")
            status, result = action(self._json())
            self._send(status, json.dumps(result, allow_nan=False).encode(), "application/json")
        except Refusal as refusal:
            self._refuse(refusal)

    def _checked_path(self) -> str:
        """Returns the path behind the token. Raises Refusal for a request that must not come in."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        allowed = self.server.origins(hosts[0]) if len(hosts) == 1 else set()
        if not allowed:
            raise Refusal(403, "unknown host: if a forwarded port or a proxy leads here, start "
                          "the program with --public-url and the address in your browser")
        if origins[1:] or not allowed.issuperset(origins) or self.command != "GET" and not origins:
            raise Refusal(403, "request from another site")
        path = self.path
        if self.server.public and path.startswith(self.server.public.path):
            path = path.removeprefix(self.server.public.path)
        token, slash, name = path.removeprefix("/").partition("/")
        if not (slash and hmac.compare_digest(token.encode(), self.server.token.encode())):
            raise Refusal(404, "open the address that the program printed")
        return name

    def _json(self) -> object:
        length, kind = self.headers.get("Content-Length", ""), self.headers.get_content_type()
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise Refusal(411, "expected Content-Length")
        if len(length) > 9 or int(length) > self.server.largest:     # int() has a limit of digits
            raise Refusal(413, f"more than {self.server.largest} bytes")
        if kind != "application/json":
            raise Refusal(415, "expected JSON")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refusal(400, "broken JSON") from None

    def _refuse(self, refusal: Refusal) -> None:
        """Answers and closes the connection. A body is not read."""
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
        """Logs nothing, because the paths contain the token."""


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def is_loopback(name: str) -> bool:
    return name == "localhost" or _is_address(name) and ipaddress.ip_address(name).is_loopback
