"""Names the files that are not JSON, and says how to convert each of them."""

import re
import shlex
from pathlib import Path

from fgrlhf.data.fields import UserError

_PANDAS = ("convert it: python -c 'import pandas, sys; pandas.read_{}(sys.argv[1])"
           '.to_json(sys.argv[2], orient="records", lines=True)\' PATH NEW')
_TABLE = ("convert it: python -c 'import sys; from fgrlhf.data.table import convert; "
          "convert(*sys.argv[1:])' PATH NEW")
_DECOMPRESS = "decompress it, or compress it with gzip"

_BEGINNINGS = (                 # (the first bytes of a file, what the file is, what to do)
    (b"PAR1", "a Parquet file", _PANDAS.format("parquet")),
    (b"ARROW1", "an Arrow file", _PANDAS.format("feather")),
    (b"\xff\xff\xff\xff", "an Arrow stream", "convert it: python -c 'import datasets, sys; "
     "datasets.Dataset.from_file(sys.argv[1]).to_json(sys.argv[2])' PATH NEW"),
    (b"BZh", "a file compressed by bzip2", _DECOMPRESS),
    (b"\xfd7zXZ\x00", "a file compressed by xz", _DECOMPRESS),
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd", _DECOMPRESS),
    (b"PK\x03\x04", "a zip archive or an Excel file", "unpack it, or export the table as CSV"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", "run git lfs pull"),
    (b"<", "a web page or XML", "download the raw file"),
    (b"\xff\xfe", "UTF-16", "convert it to UTF-8"),
    (b"\xfe\xff", "UTF-16", "convert it to UTF-8"),
)
_TABLES = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV"}

# A first line with two of these names is the header of a table, whatever the file is called.
_COLUMNS = {"id", "prompt", "input", "context", "original", "edited", "chosen", "rejected",
            "output", "instruction", "output_1", "output_2", "preference", "completion",
            "response", "text", "question", "answer", "generator", "annotator", "messages"}


def refuse_other_formats(line: bytes, path: str | Path) -> None:
    """Raises UserError when `line`, the first of the file, shows that the file holds no JSON."""
    if line.lstrip()[:1] in (b"{", b"["):
        return
    for beginning, kind, action in _BEGINNINGS:
        if line.lstrip().startswith(beginning):
            _refuse(path, kind, action)
    text = line[:10_000].decode("utf-8", errors="replace")
    delimiter = delimiter_of(text)
    names = {name.strip(' \r\n"').lower() for name in text.split(delimiter)}
    if (len(names & _COLUMNS) > 1 or re.search(r"\.[ct]sv(\.gz)?$", str(path).lower())
            or re.match(r"sep=.\s*$", text)):
        _refuse(path, _TABLES[delimiter], _TABLE)


def delimiter_of(line: str) -> str:
    """Returns what separates the cells of a table, by its first line."""
    return max(_TABLES, key=line.count)


def _refuse(path: str | Path, kind: str, action: str) -> None:
    stem = re.sub(r"(\.\w{1,7})?(\.gz)?$", "", str(path), count=1)
    new = next(name for name in (f"{stem}.jsonl", f"{stem}.converted.jsonl") if name != str(path))
    names = {"PATH": shlex.quote(str(path)), "NEW": shlex.quote(new)}
    action = re.sub("PATH|NEW", lambda found: names[found[0]], action)
    raise UserError(f"{path}: expected JSON lines or one JSON array, got {kind}; {action}")
