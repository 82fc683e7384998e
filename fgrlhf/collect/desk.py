"""The human editor without its page: who has which record, drafts, and undo.

    take      gives a tab a free record: the one that the tab had, else one with a draft of this
              annotator, else an untouched one, and last one that another annotator began
    save      keeps a draft, renews the lease, and returns the change so far
    accept    moves the edit to the Store
    skip      writes the reason to the Store
    undo      reopens the last record that this annotator accepted or skipped

A tab has one record at a time. The lease on the record belongs to one load of the page and ends
LEASE seconds after its last renewal. Until then only the same tab can take the record over (after a
reload). So two pages never have the same record at once. A page that sends text for a record that
it does not have changes only the annotator's draft.

The drafts are in EDITS.drafts.jsonl. Each save rewrites that file atomically, so drafts survive
whatever kills the program or the browser.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fgrlhf.collect.change import FREE_WORDS, Change, excess, measure
from fgrlhf.collect.line_ends import keep_line_ends
from fgrlhf.collect.store import Skip, Store, path_beside
from fgrlhf.collect.tasks import Task
from fgrlhf.data.fields import Text, UserError, check
from fgrlhf.data.files import read_json
from fgrlhf.data.records import Edit, Provenance, write_jsonl

PROMPT = "human-2"      # the instruction that annotators read, in fgrlhf/collect/prompts
LEASE = 90.0            # seconds; browsers slow the timers of hidden tabs down to one per minute


class Conflict(Exception):
    """The page does not have the record that its request names."""


@dataclass(frozen=True)
class Who:
    """One load of the page (`page`) in one tab (`tab`), and the person who uses it."""

    annotator: Text
    tab: Text
    page: Text


@dataclass(frozen=True)
class Draft:
    """An unfinished edit of one annotator."""

    id: Text
    annotator: Text
    text: str
    seconds: float                                # time that the record was open so far
    content: str | None = None                    # hash of prompt and response, see tasks.py


@dataclass(frozen=True)
class Lease:
    who: Who
    counted: float                                # the draft's seconds include the time up to here
    until: float                                  # both on the Desk's clock


def drafts_path(path: Path) -> Path:
    """Returns the path of the file of drafts."""
    return path_beside(path, "drafts")


def read_drafts(path: Path) -> list[Draft]:
    """Reads a file of drafts; a file that is not there has none. Raises UserError for others."""
    drafts = []
    for place, value in read_json(path) if path.exists() else ():
        if isinstance(value, UserError):
            raise value
        drafts.append(check(Draft, value, place))
    return drafts


class Desk:
    """Hands out tasks and takes edits, for any number of tabs at once. Thread-safe."""

    def __init__(self, tasks: list[Task], store: Store, max_change: float,
                 clock: Callable[[], float] = time.monotonic, free_words: int = FREE_WORDS):
        """Reads the drafts that are there. Raises UserError if their file holds something else."""
        self.tasks = {task.id: task for task in tasks}
        self.store, self.max_change, self.clock = store, max_change, clock
        self.free_words, self.path = free_words, drafts_path(store.path)
        self._drafts: dict[tuple[str, str], Draft] = {}         # (id, annotator)
        self._leases: dict[str, Lease] = {}
        self._held_last: dict[str, str] = {}                    # tab -> id
        self._mutex = threading.RLock()
        for draft in read_drafts(self.path):
            accepted = isinstance(store.records.get(draft.id), Edit)    # just before a kill
            if not accepted:
                self._drafts[draft.id, draft.annotator] = draft
        finished = [record for record in store.records.values() if record.id in self.tasks
                    and record.provenance and record.provenance.editor == "human"]
        finished.sort(key=lambda record: record.provenance.time)
        self._history = [(record.annotator, record.id) for record in finished]      # for undo

    def progress(self, annotator: str) -> dict:
        """Counts the records, and says if this annotator can undo one."""
        with self._mutex:
            return {"done": len(self.tasks) - len(self._remaining()), "total": len(self.tasks),
                    "undo": self._last(annotator) is not None}

    def take(self, who: Who) -> tuple[Task, str] | None:
        """Returns (a task for this tab, the text to begin with), or None if no task is free."""
        with self._mutex:
            free = [task.id for task in self._remaining()
                    if (lease := self._lease(task.id)) is None or lease.who.tab == who.tab]
            return self._hold(min(free, key=lambda id: self._order(id, who)), who) if free else None

    def save(self, who: Who, id: str, text: str, leave: bool = False) -> Change:
        """Keeps `text` as the annotator's draft, and renews the lease or, with `leave`, ends it.

        Raises Conflict if the record is finished, or if another page has it. In the second case the
        draft is kept.
        """
        with self._mutex:
            task = self._open(id)
            lease, now = self._lease(id), self.clock()
            seconds = self._draft(who, id).seconds
            if lease and lease.who == who:
                seconds += now - lease.counted
            self._drafts[id, who.annotator] = Draft(id, who.annotator, text, round(seconds, 3),
                                                    task.content)
            write_jsonl(self.path, self._drafts.values())
            if lease and lease.who != who or self._held_last.get(who.tab, id) != id:
                raise Conflict("This record is open in another tab. Your text here is kept as a "
                               "draft.")
            if leave:
                self._leases.pop(id, None)
            else:               # a lease that ran out is renewed too, if nobody took the record
                self._leases[id] = Lease(who, now, now + LEASE)
        return measure(task.rejected, text)

    def accept(self, who: Who, id: str, text: str) -> None:
        """Writes the edit; on disk when this returns. The same call again changes nothing.

        Raises Conflict as `save` does. Raises UserError for a blank edit, for an edit that changes
        more than the limit, and for a full disk. The line ends of the response are kept.
        """
        with self._mutex:
            if id in self.tasks:
                text = keep_line_ends(self.tasks[id].rejected, text)
            record = self.store.records.get(id)
            if isinstance(record, Edit) and (who.annotator, text) == (record.annotator,
                                                                      record.edited):
                return
            change = self.save(who, id, text)
            if not text.strip():
                raise UserError("The edit is empty. Keep some text, or skip the record.")
            if reason := excess(change, self.max_change, self.free_words):
                raise UserError(f"{reason}. Change less, or skip the record.")
            self.store.add(self.tasks[id].edit(text, who.annotator, self._provenance(who, id)))
            self._finish(who, id)
            del self._drafts[id, who.annotator]
            write_jsonl(self.path, self._drafts.values())

    def skip(self, who: Who, id: str, text: str, reason: str) -> None:
        """Finishes the record without an edit. Its draft is kept in case the record is reopened.

        Raises Conflict as `save` does, and UserError for a blank reason or a full disk.
        """
        with self._mutex:
            if isinstance(self.store.records.get(id), Skip) and self._last(who.annotator) == id:
                return                                          # the same call again
            if not reason.strip():
                raise UserError("Please give a reason for skipping.")
            self.save(who, id, text)
            self.store.add(self.tasks[id].skip("skipped", reason, who.annotator,
                                               self._provenance(who, id)))
            self._finish(who, id)

    def undo(self, who: Who) -> tuple[Task, str] | None:
        """Reopens the last record that this annotator finished. Returns None if there is none.

        The record opens with the text that was accepted, or with the draft of a skipped record.
        """
        with self._mutex:
            id = self._last(who.annotator)
            if id is None:
                return None
            record = self.store.records[id]
            if isinstance(record, Edit):                        # before withdrawing: no loss
                self._drafts[id, who.annotator] = Draft(
                    id, who.annotator, record.edited, record.provenance.seconds,
                    self.tasks[id].content)
                write_jsonl(self.path, self._drafts.values())
            self.store.withdraw(id)
            self._history.remove((who.annotator, id))
            return self._hold(id, who)

    # ----- called with the mutex held -------------------------------------------------------------

    def _open(self, id: str) -> Task:
        """Returns the task, or raises Conflict if it is finished or unknown."""
        if id not in self.tasks:
            raise Conflict("This record does not belong to the running session.")
        if id in self.store.records:
            raise Conflict("This record is already finished.")
        return self.tasks[id]

    def _remaining(self) -> list[Task]:
        return self.store.remaining(list(self.tasks.values()))

    def _lease(self, id: str) -> Lease | None:
        """Returns the lease on a record, or None if it has ended."""
        lease = self._leases.get(id)
        return lease if lease and lease.until >= self.clock() else None

    def _order(self, id: str, who: Who) -> int:
        """The rank of a free record for this tab; the smallest comes first (see `take` above)."""
        if self._held_last.get(who.tab) == id:
            return 0
        if (id, who.annotator) in self._drafts:
            return 1
        return 3 if any(begun == id for begun, _ in self._drafts) else 2

    def _hold(self, id: str, who: Who) -> tuple[Task, str]:
        """Gives the record to this page. The record that the tab had before becomes free."""
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
