"""Converts a table, CSV or TSV, to JSON lines."""

import csv
import io
import json
import sys
from pathlib import Path

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import opened, write_atomic
from fgrlhf.data.other_formats import delimiter_of
from fgrlhf.data.values import RECORD_LIMIT


def convert(path: str | Path, new: str | Path) -> None:
    """Writes each row of a table as a JSON object; the first row has the names of the fields.

    The delimiter is a comma, a semicolon or a tab; Excel's first line `sep=;` names it. Columns
    without a name and cells that a short row lacks are left out. A file that is not UTF-8 is read
    as Windows-1252, which Excel writes by default, and stderr says so. Raises UserError when `new`
    exists, when a row has more cells than the first one, and when a field has two columns.
    """
    if Path(new).exists():
        raise UserError(f"{new}: expected a free name, got a file; name another one")
    with opened(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
        print(f"{path}: not UTF-8, read as Windows-1252; check letters with accents",
              file=sys.stderr)
    first, _, rest = text.partition("\n")
    delimiter = delimiter_of(first)
    if first.lower().startswith("sep="):
        delimiter, text = first[4:5], rest
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    csv.field_size_limit(RECORD_LIMIT)                  # of Python's csv: 128 KiB, one article
    names, lines = next(rows, []), []
    while names and not names[-1].strip():
        names.pop()                                     # an empty last column, of Excel
    if not names:
        raise UserError(f"{path}: expected a first row with the names of the fields, got none; "
                        "add it")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: expected one column per field, got {names}; rename one")
    for row in rows:
        if any(cell.strip() for cell in row[len(names):]):
            raise UserError(f"{path}:{rows.line_num}: expected {len(names)} cells as in the first "
                            f"row, got {len(row)}; put quotes around cells with {delimiter!r}")
        if any(cell.strip() for cell in row):
            record = {name: cell for name, cell in zip(names, row) if name.strip()}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_atomic(new, "".join(lines).encode())
