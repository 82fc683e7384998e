"""Where edits are kept while they are collected: each record once, whole, and on the disk.

    EDITS.jsonl             edits, for train_rm.py as they stand; one that changes nothing says that
                            the annotator found nothing to mend
    EDITS.skipped.jsonl     what was skipped or refused, with the reason; a record whose
                            line is deleted is open again
    .EDITS.jsonl.lock       held while a program writes; the system frees it when that dies

A record is one line, written by one call and fsynced before `add` returns: whatever kills the
program, a line that `add` returned from is there. A torn last line (the program died inside the
call) was never promised to anybody; the next Store cuts it.
"""

import json
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fgrlhf.collecting.lines import Lines, lock, torn
from fgrlhf.config import UserError
from fgrlhf.edits import Edit, Provenance, plain, write_jsonl
from fgrlhf.fields import Text, check
from fgrlhf.files import read_json

OUTCOMES = ("edited", "identical", "skipped", "refused")


@dataclass(frozen=True)
class Skip:
    """A record without an edit: skipped by a person, or refused because no answer held up."""

    id: Text
    outcome: Text                                 # skipped or refused
    reason: str
    annotator: str | None = None
    provenance: Provenance | None = None


def outcome_of(record: Edit | Skip) -> str:
    """One of OUTCOMES."""
    if isinstance(record, Skip):
        return record.outcome
    return "identical" if record.original == record.edited else "edited"


class Store:
    """The records of EDITS.jsonl and of its side file; thread-safe, one program at a time.

        with Store(path) as store:
            store.add(task.edit(text, "ann", provenance))
    """

    def __init__(self, path: str | Path):
        """Reads what is there, so that collecting resumes.

        Raises UserError when another program writes to `path`, or when it holds anything but edits.
        """
        self.path = Path(path)
        self.skipped_path = skipped_path(self.path)
        self._mutex = threading.RLock()
        if self.path.is_dir():
            raise UserError(f"{path}: expected a file or a free name, got a folder; name a file")
        self._held = lock(self.path)
        try:
            self.records: dict[str, Edit | Skip] = recorded(self.path)
            self._files = {Edit: Lines(self.path), Skip: Lines(self.skipped_path)}
        except BaseException:
            os.close(self._held)
            raise

    def add(self, record: Edit | Skip) -> bool:
        """Append a record; on the disk when this returns. False, and nothing written, where a
        record of that id is there already: the first delivery counts.

        Raises UserError for a record that the readers would refuse (a blank edit), or a full disk.
        """
        check(type(record), json.loads(json.dumps(plain(record))), f"record {record.id!r}")
        with self._mutex:
            if record.id in self.records:
                return False
            self._files[type(record)].append(plain(record))
            self.records[record.id] = record
            return True

    def withdraw(self, id: str) -> Edit | Skip | None:
        """Take a record back (undo), by rewriting its file atomically; None where there is none."""
        with self._mutex:
            record = self.records.get(id)
            if record is None:
                return None
            file = self._files[type(record)]
            write_jsonl(file.path, [other for other in self.records.values()
                                    if type(other) is type(record) and other is not record])
            file.close()
            self._files[type(record)] = Lines(file.path)
            return self.records.pop(id)

    def counts(self) -> Counter:
        """How many records of each of OUTCOMES."""
        with self._mutex:
            return Counter(outcome_of(record) for record in self.records.values())

    def remaining(self, tasks: list) -> list:
        """The tasks without a record, in order."""
        with self._mutex:
            return [task for task in tasks if task.id not in self.records]

    def close(self) -> None:
        with self._mutex:
            for file in self._files.values():
                file.close()
            os.close(self._held)             # frees the lock

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def skipped_path(path: Path) -> Path:
    """The side file of EDITS.jsonl."""
    return path.with_name(path.stem + ".skipped.jsonl")


def recorded(path: Path) -> dict[str, Edit | Skip]:
    """What EDITS.jsonl and its side file hold, by id; raises UserError for anything but that."""
    return {record.id: record
            for record in [*_read(skipped_path(path), Skip), *_read(path, Edit)]}


def _read(path: Path, kind: type) -> list:
    """The records of a file's whole lines; UserError for anything else but a torn last line."""
    data = path.read_bytes() if path.exists() else b""
    if not data:
        return []
    if data.lstrip()[:1] != b"{":
        raise UserError(f"{path}:1: expected one JSON object a line, got "
                        f"{data.lstrip()[:20].decode(errors='replace')!r}; choose another --out")
    records, places = [], {}
    values = read_json(path)
    if values and isinstance(values[-1][1], UserError) and torn(data):
        values.pop()
    for place, value in values:
        if isinstance(value, UserError):
            raise value
        record = check(kind, value, place, also=("missing", "preferences"))
        if places.setdefault(record.id, place) != place:
            raise UserError(f"{place}: id: expected a new id, got {record.id!r} as in "
                            f"{places[record.id]}; delete one of the two")
        records.append(record)
    return records
