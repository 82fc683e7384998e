"""The human editor without its page: who holds which record, what is drafted, what is undone.

    take      a free record for a tab: first the one it held, then those with a draft of this
              annotator, then untouched ones, last those that another annotator began
    save      keep a draft and renew the lease; the change so far comes back
    accept    the edit goes to the Store;  skip  likewise, with a reason
    undo      take back this annotator's last record that was accepted or skipped, and hold it

A tab holds one record at a time. Its lease belongs to one load of the page, ends LEASE seconds
after the last renewal, and before that only the same tab can take it over (a reload). So two pages
never hold the same record, and what a page sends without holding it changes its draft alone.

Drafts are EDITS.drafts.jsonl beside the edits, rewritten atomically by each save: they outlive
whatever kills the program or the browser.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from fgrlhf.collecting.change import Change, excess, measure
from fgrlhf.collecting.store import Skip, Store
from fgrlhf.collecting.tasks import Task
from fgrlhf.config import UserError
from fgrlhf.edits import Edit, Provenance, write_jsonl
from fgrlhf.fields import Text, check
from fgrlhf.files import read_json

PROMPT = "human-1"      # the instruction that the annotator reads, in fgrlhf/prompts
LEASE = 90.0            # seconds: above the minute to which browsers slow the timers of hidden tabs


class Conflict(Exception):
    """The page does not hold the record that it speaks of."""


@dataclass(frozen=True)
class Who:
    """One load of the page (`page`) in one tab (`tab`), and the person before it."""

    annotator: Text
    tab: Text
    page: Text


@dataclass(frozen=True)
class Draft:
    """An unfinished edit of one annotator."""

    id: Text
    annotator: Text
    text: str
    seconds: float                                # for how long it has been open so far


@dataclass(frozen=True)
class Lease:
    who: Who
    counted: float                                # until here its time is in the draft's seconds
    until: float


class Desk:
    """Hands out tasks and takes edits, for any number of tabs at once; thread-safe."""

    def __init__(self, tasks: list[Task], store: Store, max_change: float,
                 clock: Callable[[], float] = time.monotonic):
        """Reads the drafts that are there. Raises UserError when their file holds anything else."""
        self.tasks = {task.id: task for task in tasks}
        self.store, self.max_change, self.clock = store, max_change, clock
        self.path = store.path.with_name(store.path.stem + ".drafts.jsonl")
        self._drafts: dict[tuple[str, str], Draft] = {}         # (id, annotator)
        self._leases: dict[str, Lease] = {}
        self._held_last: dict[str, str] = {}                    # tab -> id
        self._mutex = threading.RLock()
        for place, value in read_json(self.path) if self.path.exists() else ():
            if isinstance(value, UserError):
                raise value
            draft = check(Draft, value, place)
            if not isinstance(store.records.get(draft.id), Edit):       # died after accepting it
                self._drafts[draft.id, draft.annotator] = draft
        finished = [record for record in store.records.values() if record.id in self.tasks
                    and record.provenance and record.provenance.editor == "human"]
        finished.sort(key=lambda record: record.provenance.time)
        self._history = [(record.annotator, record.id) for record in finished]      # for undo

    def progress(self, annotator: str) -> dict:
        """Counts for the page, and whether this annotator has a record to undo."""
        with self._mutex:
            return {"done": len(self.tasks) - len(self._remaining()), "total": len(self.tasks),
                    "undo": self._last(annotator) is not None}

    def take(self, who: Who) -> tuple[Task, str] | None:
        """A task for this tab and the text to begin with; None when none is free."""
        with self._mutex:
            free = [task.id for task in self._remaining()
                    if (lease := self._lease(task.id)) is None or lease.who.tab == who.tab]
            return self._hold(min(free, key=lambda id: self._order(id, who)), who) if free else None

    def save(self, who: Who, id: str, text: str, leave: bool = False) -> Change:
        """Keep `text` as the annotator's draft and renew the lease, or with `leave` end it.

        Raises Conflict when the record is finished or another page holds it; the draft of a record
        that is merely held elsewhere is kept all the same.
        """
        with self._mutex:
            task = self._open(id)
            lease, now = self._lease(id), self.clock()
            seconds = self._draft(who, id).seconds
            if lease and lease.who == who:
                seconds += now - lease.counted
            self._drafts[id, who.annotator] = Draft(id, who.annotator, text, round(seconds, 3))
            write_jsonl(self.path, self._drafts.values())
            if lease and lease.who != who or self._held_last.get(who.tab, id) != id:
                raise Conflict("This record is open in another tab; what was typed here is kept "
                               "as a draft.")
            if leave:
                self._leases.pop(id, None)
            else:                                               # ran out, and nobody came: renewed
                self._leases[id] = Lease(who, now, now + LEASE)
        return measure(task.rejected, text)

    def accept(self, who: Who, id: str, text: str) -> None:
        """The edit, on the disk when this returns. Delivered again, it changes nothing.

        Raises Conflict as `save` does, and UserError for a blank edit, for one that changes more
        than max_change, and when the disk is full.
        """
        with self._mutex:
            record = self.store.records.get(id)
            if isinstance(record, Edit) and (who.annotator, text) == (record.annotator,
                                                                      record.edited):
                return
            change = self.save(who, id, text)
            if not text.strip():
                raise UserError("The edit is empty: keep something, or skip the record.")
            if reason := excess(change, self.max_change):
                raise UserError(f"{reason}: change less, or skip the record.")
            self.store.add(self.tasks[id].edit(text, who.annotator, self._provenance(who, id)))
            self._finish(who, id)
            del self._drafts[id, who.annotator]
            write_jsonl(self.path, self._drafts.values())

    def skip(self, who: Who, id: str, text: str, reason: str) -> None:
        """Leave the record without an edit, for a reason; its draft is kept, should it be reopened.

        Raises Conflict as `save` does, and UserError for a blank reason or a full disk.
        """
        with self._mutex:
            if isinstance(self.store.records.get(id), Skip) and self._last(who.annotator) == id:
                return                                          # the same, delivered again
            if not reason.strip():
                raise UserError("A skipped record needs a reason.")
            self.save(who, id, text)
            self.store.add(Skip(id, "skipped", reason, who.annotator, self._provenance(who, id)))
            self._finish(who, id)

    def undo(self, who: Who) -> tuple[Task, str] | None:
        """Reopen the last record that this annotator finished; None when there is none.

        It begins with the text that was accepted, or that was drafted before it was skipped.
        """
        with self._mutex:
            id = self._last(who.annotator)
            if id is None:
                return None
            record = self.store.records[id]
            if isinstance(record, Edit):                        # first: a crash loses nothing
                self._drafts[id, who.annotator] = Draft(id, who.annotator, record.edited,
                                                        record.provenance.seconds)
                write_jsonl(self.path, self._drafts.values())
            self.store.withdraw(id)
            self._history.remove((who.annotator, id))
            return self._hold(id, who)

    # The rest is called with the mutex held.

    def _open(self, id: str) -> Task:
        """The task, if it still is one."""
        if id not in self.tasks:
            raise Conflict("This record is not part of the session that runs now.")
        if id in self.store.records:
            raise Conflict("This record is finished already.")
        return self.tasks[id]

    def _remaining(self) -> list[Task]:
        return self.store.remaining(list(self.tasks.values()))

    def _lease(self, id: str) -> Lease | None:
        """The lease on a record, if one still runs."""
        lease = self._leases.get(id)
        return lease if lease and lease.until >= self.clock() else None

    def _order(self, id: str, who: Who) -> int:
        if self._held_last.get(who.tab) == id:
            return 0
        if (id, who.annotator) in self._drafts:
            return 1
        return 3 if any(begun == id for begun, _ in self._drafts) else 2

    def _hold(self, id: str, who: Who) -> tuple[Task, str]:
        """Give the record to this page; the tab lets go of what it held."""
        now = self.clock()
        self._leases = {other: lease for other, lease in self._leases.items()
                        if lease.who.tab != who.tab}
        self._leases[id] = Lease(who, now, now + LEASE)
        self._held_last[who.tab] = id
        return self.tasks[id], self._draft(who, id).text

    def _draft(self, who: Who, id: str) -> Draft:
        untouched = Draft(id, who.annotator, self.tasks[id].rejected, 0.0)
        return self._drafts.get((id, who.annotator), untouched)

    def _provenance(self, who: Who, id: str) -> Provenance:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return Provenance("human", now, attempts=1, seconds=self._draft(who, id).seconds,
                          prompt_version=PROMPT)

    def _finish(self, who: Who, id: str) -> None:
        self._leases.pop(id, None)
        self._history.append((who.annotator, id))

    def _last(self, annotator: str) -> str | None:
        return next((id for name, id in reversed(self._history) if name == annotator), None)
