"""People at work: one page (page/) behind a small, strict server (web.py).

actions.py says what the page can do.
"""

import os
import sys
import threading
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fgrlhf.collect.actions import Actions
from fgrlhf.collect.web import LARGEST, Address, Server, is_loopback
from fgrlhf.engine.config import arg

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The page for people (--editor human, --judge human)"""

    host: str = arg("127.0.0.1", help="network address of the page")
    port: int = arg(0, least=0, help="port of the page; 0 chooses the same one for the same file, "
                                     "or any other if that port is taken")
    allow_remote: bool = arg(False, help="let other machines use the page; give their --host too")
    public_url: str | None = arg(None, help="address of the page in the browser, if a forwarded "
                                            "port or a proxy changes it, for example "
                                            "http://localhost:9000")
    annotator: str | None = arg(None, help="name of the person (default: the page asks)")


def public_address(options: Options) -> Address | None:
    """Returns the address of --public-url, if there is one. Raises UserError if it is no URL."""
    return None if options.public_url is None else Address(options.public_url)


def serve(actions: Actions, path: Path, options: Options) -> None:
    """Serves the page until all records are done and a page ends the program, or until Ctrl-C.

    path: the file that is written; the usual port belongs to it. Raises UserError if the address
    cannot be used.
    """
    public = public_address(options)
    ports = [options.port] if options.port else [usual_port(path), 0]
    verb = "Judge" if actions.judging else "Edit"
    with Server(PAGE, actions.table, options.host, ports, options.allow_remote, public,
                actions.largest) as server:
        if not is_loopback(options.host):
            _warn(options.host)
        if public and not public.is_private:
            _warn(options.public_url)
        print(f"{verb} at {server.url}", file=sys.stderr)
        if public:
            print(f"It must lead to {server.own_url}", file=sys.stderr)
        print("Stop with Ctrl-C. Nothing is lost: the same command continues.", file=sys.stderr,
              flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            actions.finished.wait()
        except KeyboardInterrupt:
            pass
        server.shutdown()


def largest_message(texts: Iterable[str]) -> int:
    """Returns the bytes that a message of the page may have.

    A message holds one text, of up to 12 bytes per character if it doubles the longest response.
    """
    return max([LARGEST, *(12 * len(text) for text in texts)])


def _warn(address: str) -> None:
    print(f"warning: {address}: everybody on the network who knows the address can read and edit "
          "the records; nothing is encrypted", file=sys.stderr)


def usual_port(path: Path) -> int:
    """Returns the port that belongs to a path, in 20000 .. 29999.

    A browser keeps the copies of drafts per port. With the same port, a page that is opened after a
    crash finds the text that was typed while no server was running.
    """
    return 20000 + zlib.crc32(os.fsencode(path.resolve())) % 10000
