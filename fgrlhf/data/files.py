"""Files: written completely or not at all, and read as records that know their place.

Every writer of the project ends in `write_atomic`. Every reader of records starts from `read_json`
or `read_records`: each JSON value comes with its place ("pairs.jsonl:12"), so that a refusal can
name the place. Records left out are counted on stderr, by `each`.
"""

import codecs
import contextlib
import gzip
import os
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fgrlhf.data import values
from fgrlhf.data.fields import UserError, show

OBJECT_LIMIT = 2**26            # bytes of a file that is one object, 64 MiB
REFUSAL_LIMIT = 10_000          # refused records, when they are more than the others


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
    stops the program, `path` holds the old content or the new content, never a part. A file that
    is replaced keeps its permissions. Missing folders are made. Raises UserError when the system
    refuses (no permission, no space) or when `path` is a folder or a device.
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
                if path.exists():
                    shutil.copymode(path, temporary)                # a private file stays private
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


# ----- reading files ------------------------------------------------------------------------------

@contextlib.contextmanager
def opened(path: str | Path, gunzip: bool = True) -> Iterator[BinaryIO]:
    """Opens a file or a pipe for reading. With `gunzip` a gzip file gives its content.

    Raises UserError, also from inside the block, when the file is missing or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if gunzip and file.peek(2)[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=file) as content:
                    yield content
            else:
                yield file
    except FileNotFoundError:
        raise UserError(f"{path}: expected a file, got nothing; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a file, got a folder; name a file in it") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: expected a whole gzip file, got a damaged one ({error}); "
                        "fetch the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def read_bytes(path: str | Path) -> bytes:
    """Returns the content of a file as it is. Raises UserError when it cannot be read."""
    with opened(path, gunzip=False) as file:
        return file.read()


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file, plain or gzip, without its byte-order mark."""
    with opened(path) as file:
        data = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: expected UTF-8, got 0x{data[error.start]:02x}; convert "
                        "the file to UTF-8") from None


def read_object(path: str | Path, action: str = "restore the file or remove its folder") -> dict:
    """Returns the one JSON object that a file consists of. Raises UserError for anything else.

    NaN and infinities are allowed, because other programs write them into their configurations.
    action: what the message advises.
    """
    with opened(path, gunzip=False) as file:
        data = file.read(OBJECT_LIMIT + 1).removeprefix(codecs.BOM_UTF8)
    if len(data) > OBJECT_LIMIT:
        raise UserError(f"{path}: expected one JSON object of at most {OBJECT_LIMIT >> 20} MiB, "
                        f"got a larger file; {action}")
    try:
        value = values.OBJECTS.decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected one JSON object, got a file that is damaged or no JSON "
                        f"({error}); {action}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected one JSON object, got {show(value)}; {action}")
    return value


# ----- records ------------------------------------------------------------------------------------

class LeftOut(NamedTuple):
    """The result of a `build` for a good record that holds nothing of what is wanted."""
    why: str


def iterate_json(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yields (place, value) for each record of a file, see values.read_values."""
    with opened(path) as file:
        yield from values.read_values(file, path)


def read_json(path: str | Path) -> list[tuple[str, object]]:
    """Returns what `iterate_json` yields. A value that cannot be read is a UserError."""
    return list(iterate_json(path))


def require_json(path: str | Path) -> list[tuple[str, object]]:
    """Like `read_json`, but raises the UserError of the first value that cannot be read."""
    found = read_json(path)
    for _, value in found:
        if isinstance(value, UserError):
            raise value
    return found


def read_records(path: str | Path, build: Callable[[object, str], object],
                 on_bad_record: str = "stop") -> list:
    """Returns `build(value, place)` for every record of `path`, in order.

    `build` raises UserError to refuse a record. A second record with the same `id` is refused, and
    so is a file that gives no record at all. on_bad_record, LeftOut: see `each`.
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

    return each(iterate_json(path), build_one, on_bad_record, path)


def each(items: Iterable, build: Callable[[object], object], on_bad_record: str,
         path: str | Path) -> list:
    """Returns `build(item)` for every item, in order.

    `build` refuses an item by a UserError. With on_bad_record "stop" the first refusal is raised,
    with the name of the file at its beginning. With "skip" refused items are left out, and counted
    and listed on stderr. Items for which `build` returns LeftOut are left out and counted there
    too, with the reasons. Raises UserError when no item is left, and as soon as more than
    REFUSAL_LIMIT items and more than half of them are refused.
    """
    if on_bad_record not in ("stop", "skip"):
        raise ValueError(f'on_bad_record: expected "stop" or "skip", got {on_bad_record!r}')
    made, refusals, reasons, count = [], [], Counter(), 0
    for count, item in enumerate(items, 1):
        try:
            result = build(item)
        except UserError as error:
            named = str(error).startswith(str(path))
            refusal = str(error) if named else f"{path}: {error}"
            if on_bad_record == "stop":
                raise UserError(refusal) from None
            refusals.append(refusal)
            if len(refusals) > max(REFUSAL_LIMIT, count / 2):
                raise UserError(f"{path}: expected mostly usable records, got {len(refusals)} that "
                                f"are refused in the first {count}; check that this is the right "
                                f"file, the first refusal is {refusals[0]}") from None
            continue
        if isinstance(result, LeftOut):
            reasons[result.why] += 1
        else:
            made.append(result)
    why = "; ".join(f"{reason} ({n})" for reason, n in reasons.items())
    if not made:
        action = f"the first refusal is {refusals[0]}" if refusals else (
            "check that this is the right file")
        raise UserError(f"{path}: expected at least one usable record, got none in {count}"
                        f"{why and ', '}{why}; {action}")
    if reasons:
        print(f"{path}: left out {reasons.total()} of {count} records: {why}", file=sys.stderr)
    if refusals:
        print(f"{path}: left out {len(refusals)} bad records of {count}:", *refusals,
              sep="\n  ", file=sys.stderr)
    return made
