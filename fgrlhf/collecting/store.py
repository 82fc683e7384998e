"""Where edits are kept while they are collected: each record once, whole, and on the disk.

    EDITS.jsonl             edits, for train_rm.py as they stand; one that changes nothing says that
                            the annotator found nothing to mend
    EDITS.skipped.jsonl     what was skipped or refused, with the reason; delete lines to ask again
    .EDITS.jsonl.lock       held while a program writes; the system frees it when that dies

A record is one line, written by one call and fsynced before `add` returns: whatever kills the
program, a line that `add` returned from is there. A torn last line (the program died inside the
call) was never promised to anybody; the next Store cuts it.
"""

import fcntl
import json
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

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


class Lines:
    """A JSONL file that grows by whole, fsynced lines."""

    def __init__(self, path: Path):
        """Opens or makes the file and cuts a torn last line. Raises UserError where it cannot."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            data = path.read_bytes()
            if _torn(data):
                os.ftruncate(self._file, data.rfind(b"\n") + 1)
            elif data and not data.endswith(b"\n"):
                os.write(self._file, b"\n")       # a whole last line, as some editors leave it
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)                      # the new name itself
            os.close(folder)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); "
                            "choose another path") from None

    def append(self, value: dict) -> None:
        """Write one line and fsync. Raises UserError (disk full) and leaves the file as it was."""
        line = (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8")
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(28, "no space left")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room and "
                            "start again: what was collected is kept") from None

    def close(self) -> None:
        os.close(self._file)


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
        self.skipped_path = self.path.with_name(self.path.stem + ".skipped.jsonl")
        self._mutex, self._lock_file = threading.RLock(), None
        if self.path.is_dir():
            raise UserError(f"{path}: expected a file or a free name, got a folder; name a file")
        self._lock()
        try:
            self.records: dict[str, Edit | Skip] = {
                record.id: record
                for record in [*_read(self.skipped_path, Skip), *_read(self.path, Edit)]}
            self._files = {Edit: Lines(self.path), Skip: Lines(self.skipped_path)}
        except BaseException:
            os.close(self._lock_file)
            raise

    def _lock(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(self.path.with_name(f".{self.path.name}.lock"),
                                      os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_file)
            raise UserError(f"{self.path}: expected no other writer, got one that is collecting "
                            "into it now; wait for it or choose another --out") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); "
                            "choose another path") from None

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
            record = self.records.pop(id, None)
            if record is None:
                return None
            kind = type(record)
            self._files[kind].close()
            write_jsonl(self._files[kind].path,
                        [r for r in self.records.values() if isinstance(r, kind)])
            self._files[kind] = Lines(self._files[kind].path)
            return record

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
            os.close(self._lock_file)             # frees the lock

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()


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
    if values and isinstance(values[-1][1], UserError) and _torn(data):
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


def _torn(data: bytes) -> bool:
    """Whether the last line was cut short: it has no end, begins like a record, is no JSON."""
    tail = data[data.rfind(b"\n") + 1:]
    try:
        return tail.startswith(b"{") and not json.loads(tail)
    except ValueError:
        return True
