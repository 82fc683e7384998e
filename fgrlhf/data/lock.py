"""One process writes to an output folder or file at a time."""

import os
import platform
from pathlib import Path

from fgrlhf.data.fields import UserError

try:
    import fcntl
except ImportError:                                 # Windows: training works there, without locks
    fcntl = None


def lock(path: str | Path) -> int | None:
    """Locks an output for this process: the folder `path` by PATH/.lock, a file by .NAME.lock.

    Symbolic links are followed, so that two names of one folder share a lock. Returns the
    descriptor that holds the lock; the system frees it when it is closed or the process ends,
    whatever ends it. Returns None where the system has no such locks. Raises UserError, with the
    other process's id, when another process holds the lock, and when the file cannot be written.
    """
    if fcntl is None:
        return None
    real = Path(os.path.realpath(path))
    file = real / ".lock" if real.is_dir() else real.with_name(f".{real.name}.lock")
    try:
        held = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); "
                        "choose another path") from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(held, 0)
        os.pwrite(held, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
    except OSError as error:
        holder = os.pread(held, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(held)
        if not isinstance(error, BlockingIOError):
            raise UserError(f"{path}: cannot be locked ({error.strerror}); "
                            "choose another path") from None
        raise UserError(f"{path}: expected no other writer, but {holder} writes to it now; wait "
                        "for that process, stop it, or choose another path") from None
    return held
