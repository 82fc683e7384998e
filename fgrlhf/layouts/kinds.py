"""Names a model file that is not what its name says, and what to do about it.

A download often leaves something else in its place: the pointer of Git LFS, a web page, or the file
of another program.
"""

import re
from pathlib import Path

from fgrlhf.data.fields import UserError

TIKTOKEN = rb"[A-Za-z0-9+/]{1,400}={0,2} \d{1,6}\r?\n"    # the first line: a token, its rank
KINDS = (                       # (the beginning of the file, what it is, what to do)
    (rb"\Z", "an empty file", "copy the file again"),
    (rb"version https://git-lfs", "a Git LFS pointer, which only names the file",
     "run `git lfs pull` in its folder"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page", "download the file itself"),
    (rb"GGUF", "a GGUF file of llama.cpp", "name the file itself where a model is expected"),
    (rb"ggml|lmgg|fmgg|tjgg", "a file of llama.cpp from before GGUF, which is not read here",
     "use the checkpoint that it was made from"),
    (TIKTOKEN, "a tiktoken vocabulary", "name the folder that it is in"),
    (rb'\s*\{\s*"\w', "JSON", "name another file"),
)


def is_tiktoken(path: Path) -> bool:
    """Tells whether a file begins like tiktoken's."""
    with open(path, "rb") as file:
        return re.match(TIKTOKEN, file.read(512)) is not None


def check_kind(path: str | Path, expected: str) -> bytes:
    """Returns the first 512 bytes of a file.

    `expected` names the file in the message ("a torch file"). Raises UserError when the file is
    missing, cannot be read, or begins like a file of another known kind.
    """
    path = Path(path)
    if not path.is_file():
        got = "a folder or a device" if path.exists() else "nothing"
        raise UserError(f"{path}: expected {expected}, got {got}; check the path")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    for pattern, kind, action in KINDS:
        if kind not in expected and re.match(pattern, start):
            raise UserError(f"{path}: expected {expected}, got {kind}; {action}")
    return start
