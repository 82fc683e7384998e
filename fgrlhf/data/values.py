"""JSON values from JSON lines or from one JSON array, one by one, each with its place.

Stricter than Python's json: NaN, Infinity and numbers that a float cannot hold are refused, because
nobody else can read them, and so is an object that has a field twice, because one of the two values
would be lost. A value that cannot be read becomes a UserError, and reading goes on behind it.
"""

import codecs
import itertools
import json
import math
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fgrlhf.data.fields import UserError, show
from fgrlhf.data.other_formats import refuse_other_formats

RECORD_LIMIT = 2**24            # bytes of one record, 16 MiB
ARRAY_LIMIT = 2**29             # bytes of a file that is one array, 512 MiB
TOKEN_LIMIT = 10**6             # strings, commas and brackets of one element of an array
LINE_LIMIT = 10**5              # lines of one object

# A string (the last one may lack its end), or a character that gives an array its structure. The
# possessive "*+" never goes back, so a damaged file takes no longer than a good one.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_SPACE = re.compile(rb"\s*")


def read_values(file: BinaryIO, path: str | Path) -> Iterator[tuple[str, object]]:
    """Yields (place, value) for each record of an open file, in order.

    A place is "file:line" in JSON lines and "file: record N" in an array; both count from 1. A
    value that cannot be read is a UserError, for the caller to raise or to count. Blank lines and a
    byte-order mark are skipped. Only "\\n" ends a line, because U+2028 and similar characters,
    where str.splitlines cuts, may be inside JSON strings. A file with one object on several lines
    is one record. Raises UserError for a file of another format.
    """
    lines = _lines(file)
    number, line = next(lines, (1, b""))
    refuse_other_formats(line, path)
    if line.lstrip()[:1] == b"[":
        yield from _array(line, file, path, number)
        return
    held = [(number, line)] if line else []
    if _may_go_on(line, path):
        held += itertools.islice(_until(RECORD_LIMIT - len(line), lines), LINE_LIMIT)
        whole = loads(b"".join(line for _, line in held), path, number)
        if isinstance(whole, dict):
            yield f"{path}: record 1", whole
            return
    for number, line in itertools.chain(held, lines):
        yield f"{path}:{number}", _of_line(line, path, number)


def _may_go_on(line: bytes, path: str | Path) -> bool:
    """Says if `line`, the first of the file, may begin an object that ends on a later line."""
    return (line.lstrip()[:1] == b"{" and len(line) <= RECORD_LIMIT
            and isinstance(_of_line(line, path, 1), UserError))


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields (number, line), without the blank lines. Of a line over the limit the rest is lost."""
    for number in itertools.count(1):
        line = file.readline(RECORD_LIMIT + 1)
        if not line:
            return
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        too_long = len(line) > RECORD_LIMIT
        if too_long or line.strip():
            yield number, line
        while too_long and not line.endswith(b"\n"):
            line = file.readline(RECORD_LIMIT) or b"\n"


def _until(size: int, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Yields from `lines` until they have more than `size` bytes."""
    for number, line in lines:
        yield number, line
        size -= len(line)
        if size < 0:
            return


def _of_line(line: bytes, path: str | Path, number: int) -> object:
    if len(line) > RECORD_LIMIT:
        return _too_large(f"{path}:{number}")
    return loads(line.rstrip(), path, number)


def _too_large(place: str) -> UserError:
    return UserError(f"{place}: expected a record of at most {RECORD_LIMIT >> 20} MiB, got a "
                     "larger one; shorten or delete the record")


# ----- one array ----------------------------------------------------------------------------------

def _array(head: bytes, file: BinaryIO, path: str | Path,
           line: int) -> Iterator[tuple[str, object]]:
    """Yields the elements of the array that begins with `head`, at `line` of the file."""
    data = bytearray(head)
    while block := file.read(2**20):
        data += block
        if len(data) > ARRAY_LIMIT:
            raise UserError(f"{path}: expected an array of at most {ARRAY_LIMIT >> 20} MiB, got a "
                            "larger one; write one record per line in place of the array")
    counted, line_begin = 0, 0                             # newlines before `counted` are counted
    for n, (begin, end, fault) in enumerate(_elements(data), 1):
        begin = min(_SPACE.match(data, begin).end(), end)
        line += data.count(b"\n", counted, begin)
        line_begin = max(line_begin, data.rfind(b"\n", counted, begin) + 1)
        counted = begin
        value = (_too_large(f"{path}: record {n}") if end - begin > RECORD_LIMIT else
                 loads(data[begin:end], path, line, begin - line_begin, f"record {n}: "))
        if fault and (begin == end or not isinstance(value, UserError) or _is_cut(data[begin:end])):
            value = UserError(f"{path}:{line}: record {n}: {fault}")
        yield f"{path}: record {n}", value


def _elements(data: bytearray) -> Iterator[tuple[int, int, str]]:
    """Yields (begin, end, fault) of each element. A fault is a text, and ends the array."""
    start = begin = data.index(b"[") + 1
    depth = count = 0
    for token in _TOKEN.finditer(data):
        kind, count = data[token.start()], count + 1
        if count > TOKEN_LIMIT:
            yield begin, begin, (f"expected at most {TOKEN_LIMIT:,} strings, commas and brackets, "
                                 "got more; the rest of the file is not read")
            return
        if kind in b"[{":
            depth += 1
        elif kind in b"]}":
            depth -= 1
        if depth == 0 or (kind in b"," and depth == 1):
            if depth or begin > start or not _SPACE.fullmatch(data, begin, token.start()):
                yield begin, token.start(), ""
            begin, count = token.end(), 0
            if depth == 0:
                break
    if depth:
        yield begin, len(data), ('expected "]" at the end of the array, got the end of the file; '
                                 "fetch the file again, it was cut off")
    elif not _SPACE.fullmatch(data, begin):
        yield begin, begin, ("expected nothing behind the array, got more; write one array, or one "
                             "object per line")


# ----- one value ----------------------------------------------------------------------------------

def _unique(fields: list[tuple[str, object]]) -> dict:
    found = {}
    for name, value in fields:
        if name in found:
            raise ValueError(f"the field {show(name)} is given twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"{show(text)} is too large for a number")
    return float(text)


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")


OBJECTS = json.JSONDecoder(object_pairs_hook=_unique)                 # NaN is allowed
_OF_WORDS = string.ascii_letters + string.digits + string.whitespace + "+-."
_RECORDS = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite,
                            parse_constant=_refuse_constant)


def _is_cut(data: bytes) -> bool:
    """Tells whether the only fault of a JSON value is that it ends too early."""
    try:
        _RECORDS.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    except json.JSONDecodeError as error:
        rest = error.doc[error.pos:]            # empty, or the beginning of a word such as "true"
        return error.msg.startswith("Unterminated string") or not rest.strip(_OF_WORDS)
    except (RecursionError, ValueError):
        pass
    return False


def loads(data: bytes, path: str | Path, line: int = 1, column: int = 0,
          record: str = "") -> object:
    """Returns the JSON value of `data`, or a UserError.

    `data` begins behind `column` bytes of `line` of the file. record: "record 3: " in an array.
    """
    try:
        return _RECORDS.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        row = line + data.count(b"\n", 0, error.start)
        place = error.start - data.rfind(b"\n", 0, error.start) + (column if row == line else 0)
        return UserError(f"{path}:{row}: {record}expected UTF-8, got 0x{data[error.start]:02x} as "
                         f"byte {place} of the line; convert the file to UTF-8")
    except json.JSONDecodeError as error:
        place = error.colno + (column if error.lineno == 1 else 0)
        cut = not record and error.pos >= len(error.doc.rstrip())
        expected = "a JSON value" if record else "one JSON object per line, or one array"
        action = ("put the whole record on this line" if cut else
                  f"correct or delete the {'record' if record else 'line'}")
        return UserError(f"{path}:{line + error.lineno - 1}: {record}expected {expected}, got "
                         f"broken JSON at column {place} ({error.msg}); {action}")
    except (RecursionError, ValueError) as error:          # nested too deep, NaN, an endless number
        return UserError(f"{path}:{line}: {record}expected JSON, got a value that cannot be read "
                         f"({error}); correct or delete the {'record' if record else 'line'}")
