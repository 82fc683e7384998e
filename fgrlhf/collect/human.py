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

from fgrlhf.collect.change import Change, measure, segments
from fgrlhf.collect.desk import PROMPT, Conflict, Desk, Who
from fgrlhf.collect.store import Store
from fgrlhf.collect.tasks import Task, load_prompt
from fgrlhf.collect.web import Action, Server, is_loopback
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

    def __init__(self, desk: Desk, annotator: str | None):
        self.desk, self.annotator, self.finished = desk, annotator, threading.Event()
        self.table = {action.__name__: _answering(action) for action in (
            self.start, self.next, self.save, self.leave, self.accept, self.skip, self.undo,
            self.finish)}

    def start(self, request: Request) -> dict:
        """Returns what the page shows to everybody. The annotator may still be unknown."""
        return {"annotator": self.annotator, "limit": self.desk.max_change,
                "instruction": load_prompt(PROMPT)}

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
            change = self._change(task.id, text, measure(task.rejected, text))
            view["record"] = shown | {"text": text, "change": change}
        return view

    def _change(self, id: str, text: str, change: Change) -> dict:
        words = change.alignment
        return {"segments": segments(self.desk.tasks[id].rejected, text, change),
                "changed": change.distance, "share": change.share, "kept": len(words.pairs),
                "deleted": sum(words.original_changed), "inserted": sum(words.edited_changed)}


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


def serve(tasks: list[Task], store: Store, max_change: float, options: Options) -> None:
    """Serves the page until all records are done and a page ends the program, or until Ctrl-C.

    max_change: largest share of changed words, in (0, 1]. Raises UserError if the address cannot be
    used.
    """
    actions = Actions(Desk(tasks, store, max_change), options.annotator)
    ports = [options.port] if options.port else [usual_port(store.path), 0]
    with Server(PAGE, actions.table, options.host, ports, options.allow_remote) as server:
        if not is_loopback(options.host):
            print(f"warning: {options.host}: everybody on the network who knows the address can "
                  "read and edit the records; nothing is encrypted", file=sys.stderr)
        print(f"Edit at {server.url}\nStop with Ctrl-C. Nothing is lost: the same command "
              "continues.", file=sys.stderr, flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            actions.finished.wait()
        except KeyboardInterrupt:
            pass
        server.shutdown()


def usual_port(path: Path) -> int:
    """Returns the port that belongs to a path, in 20000 .. 29999.

    A browser keeps the copies of drafts per port. With the same port, a page that is opened after a
    crash finds the text that was typed while no server was running.
    """
    return 20000 + zlib.crc32(str(path.resolve()).encode()) % 10000
