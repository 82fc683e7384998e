"""The human editor: one page (page/) behind a small, strict server (web.py).

The page sends the name of an action and its data as JSON. It shows the result as text, never as
markup. desk.py decides who has which record and what is kept.
"""

import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fgrlhf.collect.change import FREE_WORDS, Change, excess, measure, segments
from fgrlhf.collect.desk import PROMPT, Conflict, Desk, Who
from fgrlhf.collect.store import Store
from fgrlhf.collect.tasks import Task, load_prompt
from fgrlhf.collect.web import LARGEST, Action, Address, Server, is_loopback
from fgrlhf.data.fields import UserError, check
from fgrlhf.engine.config import arg

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True, kw_only=True)
class Options:
    """A person as editor (--editor human)"""

    host: str = arg("127.0.0.1", help="network address of the page")
    port: int = arg(0, least=0, help="port of the page; 0 chooses the same one for the same --out, "
                                     "or any other if that port is taken")
    allow_remote: bool = arg(False, help="let other machines use the page; give their --host too")
    public_url: str | None = arg(None, help="address of the page in the browser, if a forwarded "
                                            "port or a proxy changes it, for example "
                                            "http://localhost:9000")
    annotator: str | None = arg(None, help="name of the person (default: the page asks)")


@dataclass(frozen=True)
class Request:
    """The data that the page sends with an action. Each action reads the fields that it needs."""

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


class Actions:
    """The actions of the page. Each one takes a Request and returns a JSON object."""

    def __init__(self, desk: Desk, annotator: str | None, largest: int = LARGEST):
        self.desk, self.annotator, self.finished = desk, annotator, threading.Event()
        self.largest = largest
        self.table = {action.__name__: _answering(action) for action in (
            self.start, self.next, self.save, self.leave, self.accept, self.skip, self.undo,
            self.finish)}

    def start(self, request: Request) -> dict:
        """Returns what the page shows to everybody. The annotator may still be unknown."""
        return {"annotator": self.annotator, "limit": self.desk.max_change,
                "free": self.desk.free_words, "largest": self.largest,
                "instruction": load_prompt(PROMPT)}

    def next(self, request: Request) -> dict:
        return self._view(request, self.desk.take(request.who))

    def save(self, request: Request) -> dict:
        change = self.desk.save(request.who, request.id, request.text)
        return self._change(change)

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
        """Ends the program, if every record is done."""
        progress = self.desk.progress(request.annotator)
        if progress["done"] < progress["total"]:
            raise Conflict("Some records are still open.")
        self.finished.set()
        return {}

    def _view(self, request: Request, held: tuple[Task, str] | None) -> dict:
        """Returns the progress, and the record to show or None."""
        view = self.desk.progress(request.annotator) | {"record": None}
        if held:
            task, text = held
            shown = {name: value for name, value in asdict(task).items() if name != "spans"}
            change = self._change(measure(task.rejected, text))
            view["record"] = shown | {"text": text, "change": change}
        return view

    def _change(self, change: Change) -> dict:
        words, desk = change.words, self.desk
        return {"segments": segments(change), "changed": change.distance, "share": change.share,
                "over": excess(change, desk.max_change, desk.free_words) is not None,
                "kept": len(words.pairs), "deleted": sum(words.original_changed),
                "inserted": sum(words.edited_changed)}


def _answering(action: Callable[[Request], dict]) -> Action:
    """Turns an action into a function from decoded JSON to (HTTP status, JSON object)."""
    def answer(value: object) -> tuple[int, dict]:
        try:
            return 200, action(check(Request, value, "request"))
        except Conflict as conflict:
            return 409, {"error": str(conflict)}
        except UserError as error:
            return 422, {"error": str(error)}
    return answer


def public_address(options: Options) -> Address | None:
    """Returns the address of --public-url, if there is one. Raises UserError if it is no URL."""
    return None if options.public_url is None else Address(options.public_url)


def serve(tasks: list[Task], store: Store, max_change: float, options: Options,
          free_words: int = FREE_WORDS) -> None:
    """Serves the page until all records are done and a page ends the program, or until Ctrl-C.

    max_change, free_words: the limit, see change.excess. Raises UserError if the address cannot be
    used.
    """
    desk = Desk(tasks, store, max_change, free_words=free_words)
    # A message holds one text, of up to 12 bytes per character if it doubles the longest response.
    largest = max(LARGEST, 12 * max(len(task.rejected) for task in tasks))
    actions = Actions(desk, options.annotator, largest)
    public = public_address(options)
    ports = [options.port] if options.port else [usual_port(store.path), 0]
    with Server(PAGE, actions.table, options.host, ports, options.allow_remote, public,
                largest) as server:
        if not is_loopback(options.host):
            _warn(options.host)
        if public and not public.is_private:
            _warn(options.public_url)
        print(f"Edit at {server.url}", file=sys.stderr)
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


def _warn(address: str) -> None:
    print(f"warning: {address}: everybody on the network who knows the address can read and edit "
          "the records; nothing is encrypted", file=sys.stderr)


def usual_port(path: Path) -> int:
    """Returns the port that belongs to a path, in 20000 .. 29999.

    A browser keeps the copies of drafts per port. With the same port, a page that is opened after a
    crash finds the text that was typed while no server was running.
    """
    return 20000 + zlib.crc32(str(path.resolve()).encode()) % 10000
