"""Lends each record to one tab of one person at a time, so that nobody works on it twice.

A tab has one record at a time. The lease on the record belongs to one load of the page and ends
LEASE seconds after its last renewal. Until then only the same tab can take the record over (after a
reload). So two pages never have the same record at once.

A page's record is a task with an `id`. desk.py says how a person edits it, and judging.py how a
person compares two answers.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from fgrlhf.collect.store import Skip, Store
from fgrlhf.data.fields import Text, UserError
from fgrlhf.data.records import Provenance

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
class Lease:
    who: Who
    counted: float                                # the record's seconds include the time up to here
    until: float                                  # both on the Desk's clock


class Leases:
    """The tasks of one kind and their leases. Thread-safe.

    Each desk adds `save`, which renews a lease, and `_how`, the provenance of a finished record.
    """

    instruction: str                              # a file in fgrlhf/collect/prompts, without .txt

    def __init__(self, tasks: list, store: Store, clock: Callable[[], float] = time.monotonic):
        self.tasks = {task.id: task for task in tasks}
        self.store, self.clock = store, clock
        self._leases: dict[str, Lease] = {}
        self._held_last: dict[str, str] = {}                    # tab -> id
        self._mutex = threading.RLock()
        finished = [record for record in store.records.values() if record.id in self.tasks
                    and record.provenance and record.provenance.editor == "human"]
        finished.sort(key=lambda record: record.provenance.time)
        self._history = [(record.annotator, record.id) for record in finished]      # for undo

    def progress(self, annotator: str) -> dict:
        """Counts the records, and says if this annotator can undo one."""
        with self._mutex:
            return {"done": len(self.tasks) - len(self._remaining()), "total": len(self.tasks),
                    "undo": self._last(annotator) is not None}

    def last(self, annotator: str) -> tuple[str, str] | None:
        """Returns (time, id) of the last record that this annotator finished, or None."""
        with self._mutex:
            id = self._last(annotator)
            return None if id is None else (self.store.records[id].provenance.time, id)

    def skip(self, who: Who, id: str, text: str, reason: str) -> None:
        """Finishes the record with a reason in place of an edit or a judgement.

        The draft of an edit is kept in case the record is reopened. Raises Conflict as `save` of
        the desk does, and UserError for a blank reason or a full disk.
        """
        with self._mutex:
            if isinstance(self.store.records.get(id), Skip) and self._last(who.annotator) == id:
                return                                          # the same call again
            if not reason.strip():
                raise UserError("Please give a reason for skipping.")
            self.save(who, id, text)
            self.store.add(self.tasks[id].skip("skipped", reason, who.annotator,
                                               self._how(who, id)))
            self._finish(who, id)

    # ----- called with the mutex held -------------------------------------------------------------

    def _first(self, who: Who, most: int = 9) -> str | None:
        """Returns the id of the free record that comes first for this tab, or None.

        most: the largest rank (see `_rank`) that may be taken.
        """
        free = [(rank, place, task.id) for place, task in enumerate(self._free(who))
                if (rank := self._rank(task.id, who)) <= most]
        return min(free)[2] if free else None

    def _free(self, who: Who) -> list:
        """Returns the open tasks that no other tab has."""
        return [task for task in self._remaining()
                if (lease := self._lease(task.id)) is None or lease.who.tab == who.tab]

    def _rank(self, id: str, who: Who) -> int:
        """The rank of a free record for this tab; the smallest comes first."""
        return 0 if self._held_last.get(who.tab) == id else 2

    def _open(self, id: str):
        """Returns the task, or raises Conflict if it is finished or unknown."""
        if id not in self.tasks:
            raise Conflict("This record does not belong to the running session.")
        if id in self.store.records:
            raise Conflict("This record is already finished.")
        return self.tasks[id]

    def _remaining(self) -> list:
        return self.store.remaining(list(self.tasks.values()))

    def _lease(self, id: str) -> Lease | None:
        """Returns the lease on a record, or None if it has ended."""
        lease = self._leases.get(id)
        return lease if lease and lease.until >= self.clock() else None

    def _hold(self, id: str, who: Who) -> None:
        """Gives the record to this page. The record that the tab had before becomes free."""
        now = self.clock()
        self._leases = {other: lease for other, lease in self._leases.items()
                        if lease.who.tab != who.tab}
        self._leases[id] = Lease(who, now, now + LEASE)
        self._held_last[who.tab] = id

    def _spent(self, who: Who, id: str) -> float:
        """Returns the seconds for which the page had the record since they were last counted."""
        lease = self._lease(id)
        return self.clock() - lease.counted if lease and lease.who == who else 0.0

    def _renew(self, who: Who, id: str, leave: bool, kept: str = "") -> None:
        """Renews the lease, or ends it with `leave`. A lease that ran out is renewed too, if nobody
        took the record. Raises Conflict, with the sentence `kept`, if another page has the record.
        """
        lease, now = self._lease(id), self.clock()
        if lease and lease.who != who or self._held_last.get(who.tab, id) != id:
            raise Conflict(f"This record is open in another tab.{kept}")
        if leave:
            self._leases.pop(id, None)
        else:
            self._leases[id] = Lease(who, now, now + LEASE)

    def _provenance(self, seconds: float) -> Provenance:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return Provenance("human", now, attempts=1, seconds=round(seconds, 3),
                          prompt_version=self.instruction)

    def _finish(self, who: Who, id: str) -> None:
        self._leases.pop(id, None)
        self._history.append((who.annotator, id))

    def _last(self, annotator: str) -> str | None:
        return next((id for name, id in reversed(self._history) if name == annotator), None)
