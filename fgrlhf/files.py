"""Files: whole or not at all on the way out, one JSON value with its place on the way in.

`write_atomic` is what every writer of the project ends in. `read_json` and `read_records` are what
every reader of records starts from: each JSON value travels with its place ("pairs.jsonl:12"), so
that whoever refuses it can say where it stands.
"""

import codecs
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fgrlhf.config import UserError
from fgrlhf.fields import show


class _Watched:
    """A binary file that remembers what the system refused.

    torch.save turns a full disk into a RuntimeError about positions.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.refusal = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.refusal = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_atomic(path: str | Path, data: bytes | Callable[[BinaryIO], object]) -> None:
    """Put `data` (bytes, or a function that writes into an open binary file) at `path`.

    The bytes go to a temporary name in the same folder, are fsynced and renamed: whatever stops the
    program, `path` holds the old content or the new, never half of it. Missing folders are made.
    Raises UserError when the system refuses (no permission, no space) or `path` is no plain file.
    """
    path = Path(os.path.realpath(path))                                # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected a file or a free name, got a folder or a device; "
                            "choose another path")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                watched = _Watched(file)
                try:
                    data(watched) if callable(data) else watched.write(data)
                except RuntimeError:
                    raise watched.refusal or sys.exception() from None
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":                                         # the rename itself, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); "
                        "choose another path or make room") from error


def sync(path: Path) -> None:
    """Make sure that what was appended to a file is on the disk."""
    with open(path, "ab") as file:
        os.fsync(file.fileno())


def read_bytes(path: str | Path) -> bytes:
    """The file's bytes; UserError when it is missing, a folder or unreadable."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: expected a file, got nothing; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a file, got a folder; name a file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def read_object(path: str | Path) -> dict:
    """One JSON object that the project itself wrote; UserError where it is damaged or missing."""
    try:
        value = json.loads(read_bytes(path))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged: expected one JSON object; remove its folder, or choose "
                        "another")
    return value


def read_json(path: str | Path) -> list[tuple[str, object]]:
    """(place, value) for each record of a JSONL file or of one JSON array, in order; O(bytes).

    A place is "file:line" in JSONL and "file: record N" in an array, both from 1. A JSONL line that
    is no JSON gives its UserError as the value, for the caller to raise or to count; a broken array
    raises. Blank lines and a byte-order mark are skipped. Lines end at "\\n" alone: U+2028 and its
    like are legal inside JSON strings, and str.splitlines would cut there.
    """
    data = read_bytes(path).removeprefix(codecs.BOM_UTF8)
    if data.lstrip()[:1] == b"[":
        values = _loads(data, path, line=1)
        if isinstance(values, UserError):
            raise values
        return [(f"{path}: record {n}", value) for n, value in enumerate(values, 1)]
    return [(f"{path}:{n}", _loads(line, path, n))
            for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def _loads(data: bytes, path: str | Path, line: int) -> object:
    """The JSON value of `data`, from `line` of the file on; or the UserError it deserves."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        return UserError(f"{path}:{line}: expected UTF-8, got 0x{data[error.start]:02x} as byte "
                         f"{column} of the line; convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return UserError(f"{path}:{line + error.lineno - 1}: expected one JSON object a line, or "
                         f"one array, got broken JSON at column {error.colno} ({error.msg}); "
                         "mend or delete the line")
    except (RecursionError, ValueError) as error:          # nested too deep; NaN; an endless number
        return UserError(f"{path}:{line}: expected JSON, got a value beyond its limits ({error}); "
                         "mend the line")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def read_records(path: str | Path, build: Callable[[object, str], object],
                 on_bad_record: str = "stop") -> list:
    """`build(value, place)` for every record of `path`; what it makes None of is left out.

    `build` raises UserError to refuse a record. A second record with the same `id` is refused; so
    is a file that gives no record at all. For `on_bad_record` see `each`.
    """
    place_of: dict[str, str] = {}

    def build_one(item: tuple[str, object]):
        place, value = item
        if isinstance(value, UserError):
            raise value
        record = build(value, place)
        name = getattr(record, "id", None)
        if name is not None and place_of.setdefault(name, place) != place:
            raise UserError(f"{place}: id: expected a new id, got {show(name)} as in "
                            f"{place_of[name]}; rename or delete one of the two")
        return record

    return each(read_json(path), build_one, on_bad_record, path)


def each(items: list, build: Callable[[object], object], on_bad_record: str,
         path: str | Path) -> list:
    """`build(item)` for every item; what it makes None of is left out. UserError if none is left.

    on_bad_record = "stop" raises the first refusal (a UserError of `build`), with the file's name
    in front; "skip" leaves refused items out, counts them and lists them all on stderr.
    """
    if on_bad_record not in ("stop", "skip"):
        raise ValueError(f'on_bad_record: expected "stop" or "skip", got {on_bad_record!r}')
    made, refusals = [], []
    for item in items:
        try:
            result = build(item)
        except UserError as error:
            named = str(error).startswith(str(path))
            refusal = error if named else UserError(f"{path}: {error}")
            if on_bad_record == "stop":
                raise refusal from None
            refusals.append(refusal)
            continue
        if result is not None:
            made.append(result)
    if not made:
        raise UserError(f"{path}: expected at least one usable record, got none in {len(items)}; "
                        "check that this is the right file")
    if refusals:
        print(f"{path}: left out {len(refusals)} bad records of {len(items)}:", *refusals,
              sep="\n  ", file=sys.stderr)
    return made
