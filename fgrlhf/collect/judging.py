"""A person as the judge of two answers, without the page: who has which pair, and undo.

    take      gives a tab a free pair: the one that the tab had, else the first free one
    save      renews the lease
    judge     writes the choice to the Store: "left", "right" or "tie"
    skip      writes the reason to the Store
    undo      reopens the last pair that this annotator judged or skipped

Several people can judge one pair (--judges). Nobody gets a pair twice.
"""

import time
from collections import Counter
from collections.abc import Callable

from fgrlhf.collect.judgements import CHOICES, Comparison, Judgement, Judgements
from fgrlhf.collect.leases import Conflict, Leases, Who
from fgrlhf.data.fields import UserError, show
from fgrlhf.data.records import Provenance


class JudgeDesk(Leases):
    """Hands out comparisons and takes choices, for any number of tabs at once. Thread-safe."""

    instruction = "human-judge-1"

    def __init__(self, tasks: list[Comparison], store: Judgements,
                 clock: Callable[[], float] = time.monotonic):
        super().__init__(tasks, store, clock)
        self._seconds = Counter()                               # (id, annotator) -> time spent

    def take(self, who: Who) -> Comparison | None:
        """Returns a comparison for this tab, or None if no comparison is free for this person."""
        with self._mutex:
            id = self._first(who)
            if id is None:
                return None
            self._hold(id, who)
            return self.tasks[id]

    def save(self, who: Who, id: str, text: str = "", leave: bool = False) -> None:
        """Renews the lease or, with `leave`, ends it. `text` is not used.

        Raises Conflict if the pair is judged, or if another page has it.
        """
        with self._mutex:
            if self._open(id).pair in self._pairs_of(who.annotator):
                raise Conflict("You have judged this pair already.")
            self._seconds[id, who.annotator] += self._spent(who, id)
            self._renew(who, id, leave)

    def judge(self, who: Who, id: str, choice: str) -> Judgement:
        """Writes and returns the judgement; on disk when this returns. The same call again changes
        nothing.

        Raises Conflict as `save` does, and UserError for another choice or a full disk.
        """
        if choice not in CHOICES:
            raise UserError(f"choice: expected one of {', '.join(CHOICES)}, got {show(choice)}")
        with self._mutex:
            record = self.store.records.get(id)
            if id in self.tasks and isinstance(record, Judgement):
                same = self.tasks[id].judge(choice, who.annotator, record.provenance)
                if same == record:
                    return record
            self.save(who, id)
            record = self.tasks[id].judge(choice, who.annotator, self._how(who, id))
            try:
                self.store.add(record)
            finally:
                if id in self.store.records:            # also if only its pair was not written
                    self._finish(who, id)
            return record

    def undo(self, who: Who) -> Comparison | None:
        """Reopens the last comparison that this annotator finished, or returns None."""
        with self._mutex:
            id = self._last(who.annotator)
            if id is None:
                return None
            record = self.store.withdraw(id)
            self._seconds[id, who.annotator] = record.provenance.seconds
            self._history.remove((who.annotator, id))
            self._hold(id, who)
            return self.tasks[id]

    def for_others(self, annotator: str) -> int:
        """Counts the open comparisons that must go to other people, who judge the same pairs."""
        with self._mutex:
            mine = self._pairs_of(annotator)
            return sum(task.pair in mine for task in self._remaining())

    # ----- called with the mutex held -------------------------------------------------------------

    def _free(self, who: Who) -> list[Comparison]:
        """Returns the open comparisons of pairs that are new to this person."""
        known = self._pairs_of(who.annotator) | {
            self.tasks[id].pair for id, lease in self._leases.items() if self._lease(id)
            and lease.who.annotator == who.annotator and lease.who.tab != who.tab}
        return [task for task in super()._free(who) if task.pair not in known]

    def _pairs_of(self, annotator: str) -> set[str]:
        """Returns the pairs that this annotator judged or skipped."""
        return {self.tasks[id].pair for name, id in self._history if name == annotator}

    def _how(self, who: Who, id: str) -> Provenance:
        return self._provenance(self._seconds[id, who.annotator])
