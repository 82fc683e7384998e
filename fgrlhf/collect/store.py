"""Keeps the collected edits on disk: each record once, and as a whole line.

    EDITS.jsonl             the edits, ready for train_rm.py; an edit that changes nothing says that
                            the annotator found nothing to correct
    EDITS.skipped.jsonl     the records that were skipped or refused, with the reason; delete the
                            line of a record to have it edited again
    .EDITS.jsonl.lock       locked while a process writes; the system frees it when the process ends

A record is one line, written by one call and fsynced before `add` returns. Whatever kills the
program, every line for which `add` returned is there. A last line that was cut off belongs to a
call that never returned; the next Store removes it.
"""

import codecs
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from fgrlhf.collect.lines import Lines, lock_file, torn
from fgrlhf.data.fields import Text, UserError, check
from fgrlhf.data.files import read_json
from fgrlhf.data.records import Edit, Provenance, plain, write_jsonl

OUTCOMES = ("edited", "identical", "skipped", "refused")


@dataclass(frozen=True)
class Skip:
    """A record without an edit: a person skipped it, or no answer of a model was usable."""

    id: Text
    outcome: Text                                 # skipped or refused
    reason: str
    annotator: str | None = None
    provenance: Provenance | None = None
    content: str | None = None                    # hash of prompt and response, see tasks.py


def outcome_of(record: Edit | Skip) -> str:
    """Returns the outcome of a record, one of OUTCOMES."""
    if isinstance(record, Skip):
        return record.outcome
    return "identical" if record.original == record.edited else "edited"


class Store:
    """The records of EDITS.jsonl and EDITS.skipped.jsonl. Thread-safe; one process writes.

        with Store(path) as store:
            store.add(task.edit(text, "ann", provenance))

    When a UserError ends the block, the files that are new and still empty are removed.
    """

    def __init__(self, path: str | Path, kind: type = Edit):
        """Reads the records that are there, so that a collection continues.

        kind: the dataclass of the file's records, which have an `id`; judgements.py has another.
        A link is followed: all names of a file have the same skipped records, drafts and lock.
        Raises UserError if another process writes to `path`, or if `path` holds something else.
        """
        self.path = Path(os.path.realpath(path))
        self.skipped_path = skipped_path(self.path)
        self._mutex = threading.RLock()
        if self.path.is_dir():
            raise UserError(f"{path}: expected a file or a free name, got a folder; name a file")
        self._held = lock_file(self.path)
        self._new = [file for file in (self.path, self.skipped_path) if not file.exists()]
        try:
            self.records: dict[str, Edit | Skip] = recorded(self.path, kind)
            self._files = {kind: Lines(self.path), Skip: Lines(self.skipped_path)}
        except BaseException:
            os.close(self._held)
            raise

    def add(self, record: Edit | Skip) -> bool:
        """Appends a record; on disk when this returns.

        Returns False and writes nothing if there is a record of the same id: the first one counts.
        Raises UserError for a record that the readers would refuse (a blank edit), and for a full
        disk.
        """
        check(type(record), json.loads(json.dumps(plain(record))), f"record {record.id!r}")
        with self._mutex:
            if record.id in self.records:
                return False
            self._files[type(record)].append(plain(record))
            self.records[record.id] = record
            return True

    def withdraw(self, id: str) -> Edit | Skip | None:
        """Removes and returns a record (for undo), or returns None.

        The record's file is rewritten atomically.
        """
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

    def remaining(self, tasks: list) -> list:
        """Returns the tasks without a record, in order."""
        with self._mutex:
            return [task for task in tasks if task.id not in self.records]

    def close(self) -> None:
        with self._mutex:
            for file in self._files.values():
                file.close()
            os.close(self._held)             # frees the lock

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        with self._mutex:
            if isinstance(error, UserError):
                for file in self._new:
                    if file.exists() and file.stat().st_size == 0:
                        file.unlink()
            self.close()                     # frees the lock, so this comes last


def path_beside(path: Path, name: str) -> Path:
    """Returns the path of another file of a collection: EDITS.NAME.jsonl next to EDITS.jsonl.

    Other suffixes stay, so that edits.alice and edits.bob do not share their files.
    """
    stem = path.stem if path.suffix in (".jsonl", ".json") else path.name
    return path.with_name(f"{stem}.{name}.jsonl")


def skipped_path(path: Path) -> Path:
    """Returns the path of the file of skipped records."""
    return path_beside(path, "skipped")


def recorded(path: Path, kind: type = Edit) -> dict[str, Edit | Skip]:
    """Reads the records of both files, by id. Raises UserError for a file of something else."""
    return {record.id: record
            for record in [*read_kind(skipped_path(path), Skip), *read_kind(path, kind)]}


def read_kind(path: Path, kind: type) -> list:
    """Reads the records of one kind of a file. A last line that was cut off is left out."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8) if path.exists() else b""
    if not data:
        return []
    if data.lstrip()[:1] != b"{":
        raise UserError(f"{path}:1: expected one JSON object per line, got "
                        f"{data.lstrip()[:20].decode(errors='replace')!r}; choose another file")
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
