"""The actions of the page (page/): what it asks for, and what it is shown.

The page sends the name of an action and its data as JSON. It shows the result as text, never as
markup. desk.py and judging.py decide who has which record and what is kept.

A record is of the kind "edit" (a response to edit) or "judge" (two answers to compare). With both
kinds, the worse answer of a pair becomes a record to edit, and the page that judged the pair gets
it at once.
"""

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

from fgrlhf.collect.change import Change, excess, marked, measure, segments
from fgrlhf.collect.desk import Desk
from fgrlhf.collect.judgements import Comparison
from fgrlhf.collect.judging import JudgeDesk
from fgrlhf.collect.leases import Conflict, Leases, Who
from fgrlhf.collect.tasks import Task, load_prompt
from fgrlhf.collect.web import LARGEST, Action
from fgrlhf.data.fields import UserError, check, show


@dataclass(frozen=True)
class Request:
    """The data that the page sends with an action. Each action reads the fields that it needs."""

    annotator: str = ""
    tab: str = ""
    page: str = ""
    kind: str = "edit"
    id: str = ""
    text: str = ""
    reason: str = ""
    choice: str = ""

    @property
    def who(self) -> Who:
        return check(Who, {"annotator": self.annotator, "tab": self.tab, "page": self.page},
                     "request")


class Actions:
    """The actions of the page. Each one takes a Request and returns a JSON object."""

    def __init__(self, edits: Desk | None, judging: JudgeDesk | None, annotator: str | None,
                 largest: int = LARGEST):
        """edits, judging: what the page asks for; with both, a judgement leads to an edit."""
        self.edits, self.judging, self.annotator = edits, judging, annotator
        self.desks: dict[str, Leases] = {
            kind: desk for kind, desk in (("edit", edits), ("judge", judging)) if desk}
        self.largest, self.finished = largest, threading.Event()
        self._both = threading.Lock()           # held while an action changes both desks
        self.table = {action.__name__: _answering(action) for action in (
            self.start, self.next, self.save, self.leave, self.accept, self.judge, self.skip,
            self.undo, self.finish)}

    def start(self, request: Request) -> dict:
        """Returns what the page shows to everybody. The annotator may still be unknown."""
        limits = {"limit": self.edits.max_change, "free": self.edits.free_words
                  } if self.edits else {}
        return limits | {"annotator": self.annotator, "largest": self.largest, "instructions": {
            kind: load_prompt(desk.instruction) for kind, desk in self.desks.items()}}

    def next(self, request: Request) -> dict:
        """Gives the page a record: an edit that this person began, else a pair, else an edit."""
        who = request.who
        for desk, most in ((self.edits, [1]), (self.judging, []), (self.edits, [])):
            if desk and (held := desk.take(who, *most)):
                return self._view(request, held)
        return self._view(request, None)

    def save(self, request: Request) -> dict:
        change = self._desk(request).save(request.who, request.id, request.text)
        return self._change(change) if change else {}

    def leave(self, request: Request) -> dict:
        self._desk(request).save(request.who, request.id, request.text, leave=True)
        return {}

    def accept(self, request: Request) -> dict:
        self._desk(request, "edit").accept(request.who, request.id, request.text)
        return self.next(request)

    def judge(self, request: Request) -> dict:
        with self._both:
            judgement = self._desk(request, "judge").judge(request.who, request.id, request.choice)
            task = judgement.as_task()
            if self.edits and task:
                self.edits.add(task, judgement.annotator, request.who)
        return self.next(request)

    def skip(self, request: Request) -> dict:
        self._desk(request).skip(request.who, request.id, request.text, request.reason)
        return self.next(request)

    def undo(self, request: Request) -> dict:
        """Reopens the last record that this annotator finished, of whatever kind."""
        who = request.who
        with self._both:
            finished = [(last, kind) for kind, desk in self.desks.items()
                        if (last := desk.last(who.annotator))]
            if not finished:
                raise UserError("There is nothing to undo.")
            (_, id), kind = max(finished)
            if kind == "judge" and self.edits:
                self.edits.remove(id, who)
            held = self.desks[kind].undo(who)
        return self._view(request, held)

    def finish(self, request: Request) -> dict:
        """Ends the program, if every record is done."""
        with self._both:
            progress = self._progress(request.annotator)
            if progress["done"] < progress["total"]:
                raise Conflict("Some records are still open.")
            self.finished.set()
        return {}

    def _desk(self, request: Request, *kinds: str) -> Leases:
        """Returns the desk of the request's kind of record, which must be one of `kinds`."""
        if request.kind not in self.desks or kinds and request.kind not in kinds:
            raise UserError(f"kind: expected one of {', '.join(kinds or self.desks)}, "
                            f"got {show(request.kind)}")
        return self.desks[request.kind]

    def _progress(self, annotator: str) -> dict:
        """Counts records or pairs. A pair that waits for its edit is not done."""
        counts = [desk.progress(annotator) for desk in self.desks.values()]
        others = self.judging.for_others(annotator) if self.judging else 0
        found = counts[-1] | {"undo": any(count["undo"] for count in counts), "others": others}
        if len(counts) == 2:
            found["done"] -= counts[0]["total"] - counts[0]["done"]
        return found

    def _view(self, request: Request, held: tuple[Task, str] | Comparison | None) -> dict:
        """Returns the progress, and the record to show or None."""
        view = self._progress(request.annotator) | {"record": None}
        if isinstance(held, Comparison):
            view["record"] = self._pair(held)
        elif held:
            task, text = held
            shown = {name: value for name, value in asdict(task).items() if name != "spans"}
            change = self._change(measure(task.rejected, text))
            view["record"] = shown | {"kind": "edit", "text": text, "change": change}
        if held:
            desk = self.desks[view["record"]["kind"]]
            view["practised"] = desk.last(request.annotator) is not None
        return view

    def _pair(self, task: Comparison) -> dict:
        """Returns the two answers from left to right, in parts with a mark where they differ.

        Nothing in the result tells the two systems apart.
        """
        change = measure(*task.shown)
        flags = change.parts.original_changed, change.parts.edited_changed
        return {"kind": "judge", "id": task.id, "prompt": task.prompt, "input": task.input,
                "context": [asdict(passage) for passage in task.context],
                "answers": [marked(text, changed) for text, changed in zip(task.shown, flags)]}

    def _change(self, change: Change) -> dict:
        words, desk = change.words, self.edits
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
