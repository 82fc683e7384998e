"""Files: written completely or not at all, and read as JSON values that know their place.

Every writer of the project ends in `write_atomic`. Every reader of records starts from `read_json`
or `read_records`: each JSON value comes with its place ("pairs.jsonl:12"), so that a refusal can
name the place.
"""

import codecs
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fgrlhf.data.fields import UserError, show


# ----- writing ------------------------------------------------------------------------------------

class _Watched:
    """A binary file that keeps the system's error, because torch.save hides it.

    torch.save turns a full disk into a RuntimeError about positions in the file.
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
    """Writes `data` to `path`: bytes, or a function that writes into an open binary file.

    The bytes go to a temporary file in the same folder, which is fsynced and renamed. Whatever
    stops the program, `path` holds the old content or the new content, never a part. Missing
    folders are made. Raises UserError when the system refuses (no permission, no space) or when
    `path` is a folder or a device.
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
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); "
                        "choose another path or make room") from error


def _sync_folder(path: Path) -> None:
    """Waits until the folder's list of names, and so a rename in it, is on the disk."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sync(path: Path) -> None:
    """Waits until everything that was appended to a file is on the disk."""
    with open(path, "ab") as file:
        os.fsync(file.fileno())


# ----- reading JSON -------------------------------------------------------------------------------

def read_bytes(path: str | Path) -> bytes:
    """Returns the content of a file. Raises UserError when it is missing or cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: expected a file, got nothing; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a file, got a folder; name a file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def read_object(path: str | Path) -> dict:
    """Returns the one JSON object that a file consists of. Raises UserError for anything else."""
    data = read_bytes(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected one JSON object, got a file that is damaged or no JSON "
                        f"({error}); restore the file or remove its folder") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected one JSON object, got {show(value)}; restore the file or "
                        "remove its folder")
    return value


def read_json(path: str | Path) -> list[tuple[str, object]]:
    """Returns (place, value) for each record of a JSONL file or of one JSON array, in order.

    A place is "file:line" in JSONL and "file: record N" in an array; both count from 1. A JSONL
    line that is not JSON gives its UserError as the value, for the caller to raise or to count. A
    broken array raises. Blank lines and a byte-order mark are skipped. Only "\\n" ends a line,
    because U+2028 and similar characters, where str.splitlines cuts, may be inside JSON strings.
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
    """Returns the JSON value of `data`, or a UserError. `data` begins at `line` of the file."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        return UserError(f"{path}:{line}: expected UTF-8, got 0x{data[error.start]:02x} as byte "
                         f"{column} of the line; convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return UserError(f"{path}:{line + error.lineno - 1}: expected one JSON object per line, or "
                         f"one array, got broken JSON at column {error.colno} ({error.msg}); "
                         "correct or delete the line")
    except (RecursionError, ValueError) as error:          # nested too deep, NaN, an endless number
        return UserError(f"{path}:{line}: expected JSON, got a value that cannot be read "
                         f"({error}); correct or delete the line")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")


# ----- records ------------------------------------------------------------------------------------

def read_records(path: str | Path, build: Callable[[object, str], object],
                 on_bad_record: str = "stop") -> list:
    """Returns `build(value, place)` for every record of `path`, in order. None is left out.

    `build` raises UserError to refuse a record. A second record with the same `id` is refused, and
    so is a file that gives no record at all. on_bad_record: see `each`.
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
    """Returns `build(item)` for every item, in order. None is left out.

    `build` refuses an item by a UserError. With on_bad_record "stop" the first refusal is raised,
    with the name of the file at its beginning. With "skip" refused items are left out, and counted
    and listed on stderr. Raises UserError when no item is left.
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
