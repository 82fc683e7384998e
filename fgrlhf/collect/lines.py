"""A JSONL file that grows line by line. One process writes, and a kill loses no written line."""

import errno
import json
import os
from pathlib import Path

from fgrlhf.data.fields import UserError
from fgrlhf.data.lock import lock


def lock_file(path: Path) -> int:
    """Locks `path` for this process, in a folder that is made if needed; see fgrlhf/data/lock.py.

    Returns the descriptor to close. Raises UserError if another process has the lock, and on a
    system without locks, because two writers would mix their lines.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); "
                        "choose another path") from None
    held = lock(path)
    if held is None:
        raise UserError("fgrlhf.collect: expected a system with flock, got none; "
                        "use Linux or macOS")
    return held


def torn(data: bytes) -> bool:
    """True if the last line was cut off: it begins like a record, but is not complete JSON."""
    tail = data[data.rfind(b"\n") + 1:]
    try:
        return tail.startswith(b"{") and not json.loads(tail)
    except ValueError:
        return True


class Lines:
    """A JSONL file that is open for appending."""

    def __init__(self, path: Path):
        """Opens or creates the file, and removes a last line that was cut off.

        Raises UserError if the file cannot be written.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            data = path.read_bytes()
            if torn(data):
                os.ftruncate(self._file, data.rfind(b"\n") + 1)
            elif data and not data.endswith(b"\n"):
                os.write(self._file, b"\n")       # some text editors leave out the last newline
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)                      # so that a crash cannot lose a new file's name
            os.close(folder)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); "
                            "choose another path") from None

    def append(self, value: dict) -> None:
        """Writes one line and fsyncs it.

        If the disk is full, raises UserError and leaves the file as it was.
        """
        line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free some space "
                            "and start again: everything written before is kept") from None

    def close(self) -> None:
        os.close(self._file)
