"""The human editor: one page (page/) behind a small strict server (web.py).

The page sends an action and what concerns it as JSON; what comes back is shown as text, never as
markup. Who holds which record, and what is kept of it, is decided at the desk (desk.py).
"""

import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fgrlhf.collecting.change import Change, measure
from fgrlhf.collecting.desk import PROMPT, Conflict, Desk, Who
from fgrlhf.collecting.segments import segments
from fgrlhf.collecting.store import Store
from fgrlhf.collecting.tasks import Task
from fgrlhf.collecting.web import Action, Server, is_loopback
from fgrlhf.config import UserError
from fgrlhf.fields import check

PAGE = Path(__file__).parent / "page"
INSTRUCTION = Path(__file__).parents[1] / "prompts" / f"{PROMPT}.txt"


@dataclass(frozen=True)
class Options:
    """What the command line says about the page."""

    max_change: float                             # largest share of changed words, in (0, 1]
    host: str = "127.0.0.1"
    port: int = 0                                 # 0: usual_port where it is free, or any
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


class Actions:
    """What the page can ask for; each action takes a Request and returns a JSON object."""

    def __init__(self, desk: Desk, options: Options):
        self.desk, self.options, self.finished = desk, options, threading.Event()
        self.table = {action.__name__: _answering(action) for action in (
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


def _answering(action: Callable[[Request], dict]) -> Action:
    """The action on decoded JSON, with the status of its answer."""
    def answer(value: object) -> tuple[int, dict]:
        try:
            return 200, action(check(Request, value, "request"))
        except Conflict as conflict:
            return 409, {"error": str(conflict)}
        except UserError as error:
            return 422, {"error": str(error)}
    return answer


def serve(tasks: list[Task], store: Store, options: Options) -> None:
    """Serve the page until all is done and a page says so, or the user stops the program.

    Raises UserError when the address is not to be had.
    """
    actions = Actions(Desk(tasks, store, options.max_change), options)
    ports = [options.port] if options.port else [usual_port(store.path), 0]
    with Server(PAGE, actions.table, options.host, ports, options.allow_remote) as server:
        if not is_loopback(options.host):
            print(f"warning: {options.host}: whoever learns this address on the network can read "
                  "and edit the records; nothing is encrypted", file=sys.stderr)
        print(f"Edit at {server.url}\nStop with Ctrl-C: nothing is lost, the next run goes on.",
              file=sys.stderr, flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            actions.finished.wait()
        except KeyboardInterrupt:
            pass
        server.shutdown()


def usual_port(path: Path) -> int:
    """The port of a path, 20000 .. 29999: what the browser kept of drafts belongs to the port.

    So a page opened after a crash finds what was typed while no server was there to take it.
    """
    return 20000 + zlib.crc32(str(path.resolve()).encode()) % 10000
