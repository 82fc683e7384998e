"""The human editor without its page: who has which record, drafts, and undo.

    take      gives a tab a free record: the one that the tab had, else one with a draft of this
              annotator, else an untouched one, and last one that another annotator began
    save      keeps a draft, renews the lease, and returns the change so far
    accept    moves the edit to the Store
    skip      writes the reason to the Store
    undo      reopens the last record that this annotator accepted or skipped

leases.py says which tab has which record. A page that sends text for a record that it does not have
changes only the annotator's draft.

The drafts are in EDITS.drafts.jsonl. Each save rewrites that file atomically, so drafts survive
whatever kills the program or the browser.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fgrlhf.collect.change import FREE_WORDS, Change, excess, measure
from fgrlhf.collect.leases import Leases, Who
from fgrlhf.collect.line_ends import keep_line_ends
from fgrlhf.collect.store import Store, path_beside
from fgrlhf.collect.tasks import Task
from fgrlhf.data.fields import Text, UserError, check
from fgrlhf.data.files import require_json
from fgrlhf.data.records import Edit, Provenance, write_jsonl


@dataclass(frozen=True)
class Draft:
    """An unfinished edit of one annotator."""

    id: Text
    annotator: Text
    text: str
    seconds: float                                # time that the record was open so far
    content: str | None = None                    # hash of prompt and response, see tasks.py


def drafts_path(path: Path) -> Path:
    """Returns the path of the file of drafts."""
    return path_beside(path, "drafts")


def read_drafts(path: Path) -> list[Draft]:
    """Reads a file of drafts; a file that is not there has none. Raises UserError for others."""
    return [check(Draft, value, place)
            for place, value in (require_json(path) if path.exists() else ())]


class Desk(Leases):
    """Hands out tasks and takes edits, for any number of tabs at once. Thread-safe."""

    instruction = "human-2"

    def __init__(self, tasks: list[Task], store: Store, max_change: float,
                 clock: Callable[[], float] = time.monotonic, free_words: int = FREE_WORDS):
        """Reads the drafts that are there. Raises UserError if their file holds something else."""
        super().__init__(tasks, store, clock)
        self.max_change, self.free_words = max_change, free_words
        self.path = drafts_path(store.path)
        self._drafts: dict[tuple[str, str], Draft] = {}         # (id, annotator)
        self._judged_by: dict[str, str] = {}                    # id -> who found it the worse one
        for draft in read_drafts(self.path):
            accepted = isinstance(store.records.get(draft.id), Edit)    # just before a kill
            if not accepted:
                self._drafts[draft.id, draft.annotator] = draft

    def take(self, who: Who, most: int = 9) -> tuple[Task, str] | None:
        """Returns (a task for this tab, the text to begin with), or None if no task is free.

        most: with 1, only tasks that this tab or this annotator has begun.
        """
        with self._mutex:
            id = self._first(who, most)
            return None if id is None else self._held(id, who)

    def add(self, task: Task, judge: str | None, who: Who | None = None) -> None:
        """Adds a task that follows from a judgement, and gives it to the page `who`, if any.

        judge: the annotator who found the task's response the worse one. A draft of the other
        answer, from before that judgement was undone, is dropped.
        """
        with self._mutex:
            self.tasks[task.id], self._judged_by[task.id] = task, judge
            kept = {key: draft for key, draft in self._drafts.items()
                    if key[0] != task.id or draft.content == task.content}
            if len(kept) < len(self._drafts):
                self._drafts = kept
                write_jsonl(self.path, kept.values())
            if who and task.id not in self.store.records:
                self._hold(task.id, who)

    def remove(self, id: str, who: Who) -> None:
        """Removes a task that `add` added, because its judgement is undone.

        Raises UserError if the task is finished, or open in another tab.
        """
        with self._mutex:
            if id not in self.tasks:
                return
            lease = self._lease(id)
            if id in self.store.records or lease and lease.who.tab != who.tab:
                raise UserError("The worse answer of your last pair is finished, or open in "
                                "another tab, so your judgement cannot be undone.")
            self._leases.pop(id, None)
            del self.tasks[id]

    def save(self, who: Who, id: str, text: str, leave: bool = False) -> Change:
        """Keeps `text` as the annotator's draft, and renews the lease or, with `leave`, ends it.

        Raises Conflict if the record is finished, or if another page has it. In the second case the
        draft is kept.
        """
        with self._mutex:
            task = self._open(id)
            seconds = self._draft(who, id).seconds + self._spent(who, id)
            self._drafts[id, who.annotator] = Draft(id, who.annotator, text, round(seconds, 3),
                                                    task.content)
            write_jsonl(self.path, self._drafts.values())
            self._renew(who, id, leave, " Your text here is kept as a draft.")
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
            self.store.add(self.tasks[id].edit(text, who.annotator, self._how(who, id)))
            self._finish(who, id)
            del self._drafts[id, who.annotator]
            write_jsonl(self.path, self._drafts.values())

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
            return self._held(id, who)

    # ----- called with the mutex held -------------------------------------------------------------

    def _rank(self, id: str, who: Who) -> int:
        """Returns 0 for the tab's record, 1 for one that this annotator began or judged, 2 for an
        untouched one, and 3 for one that another annotator began or judged.
        """
        if self._held_last.get(who.tab) == id:
            return 0
        begun = {name for draft, name in self._drafts if draft == id}
        begun |= {self._judged_by[id]} if id in self._judged_by else set()
        return 1 if who.annotator in begun else 3 if begun else 2

    def _held(self, id: str, who: Who) -> tuple[Task, str]:
        self._hold(id, who)
        return self.tasks[id], self._draft(who, id).text

    def _draft(self, who: Who, id: str) -> Draft:
        untouched = Draft(id, who.annotator, self.tasks[id].rejected, 0.0)
        return self._drafts.get((id, who.annotator), untouched)

    def _how(self, who: Who, id: str) -> Provenance:
        return self._provenance(self._draft(who, id).seconds)
