"""Finds model folders: inside the folder of a run, and after a run was copied or moved."""

import os
from pathlib import Path

from fgrlhf.data.fields import UserError


def refuse_run_folder(path: str | Path) -> None:
    """Raises UserError for the folder of a run, and names the model folders in it."""
    path = Path(path)
    holds = lambda *names: any((path / name).is_file() for name in names)
    if not holds("metrics.jsonl", "done.json") or holds("tokenizer.model", "params.json"):
        return
    models = [str(path / name) for name in ("policy", "best", "reward") if (path / name).is_dir()]
    advice = f"give {' or '.join(models)}" if models else "it holds no model yet; finish the run"
    raise UserError(f"{path}: expected a model folder, got the folder of a run; {advice}")


def relocated(path: str, old: str, new: str | Path) -> str:
    """Returns where `path` is for a folder that was written as `old` and is now read as `new`.

    A folder that was copied or moved together with its neighbours uses the neighbours at the new
    place. Without them, and when nothing was moved, `path` is returned as it is.
    """
    if os.path.realpath(old) == os.path.realpath(new):
        return path
    there = os.path.normpath(os.path.join(new, os.path.relpath(path, old)))
    return there if os.path.exists(there) else path
