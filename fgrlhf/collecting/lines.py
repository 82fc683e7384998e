"""A file that grows by whole lines, one program at a time, and survives whatever kills that one."""

import errno
import json
import os
from pathlib import Path

from fgrlhf.config import UserError


def lock(path: Path) -> int:
    """Hold `path` for this process by a file beside it; returns what to close.

    The system releases it when the process dies. Raises UserError where another one holds it.
    """
    try:
        import fcntl                              # here, so that Windows can train and evaluate
    except ImportError:
        raise UserError("collecting: needs a system with flock; use Linux or macOS") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(held)
            raise
        return held
    except BlockingIOError:
        raise UserError(f"{path}: expected no other writer, got a program that writes into it now; "
                        "wait for it or choose another file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); "
                        "choose another path") from None


def torn(data: bytes) -> bool:
    """Whether the last line was cut short: it has no end, begins like a record, is no JSON."""
    tail = data[data.rfind(b"\n") + 1:]
    try:
        return tail.startswith(b"{") and not json.loads(tail)
    except ValueError:
        return True


class Lines:
    """A JSONL file opened for appending."""

    def __init__(self, path: Path):
        """Open or make the file and cut a torn last line. Raises UserError where it cannot."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            data = path.read_bytes()
            if torn(data):
                os.ftruncate(self._file, data.rfind(b"\n") + 1)
            elif data and not data.endswith(b"\n"):
                os.write(self._file, b"\n")       # a whole last line, as some text editors leave it
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
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room and "
                            "start again: what was written before is kept") from None

    def close(self) -> None:
        os.close(self._file)
