"""Finds model folders in runs and where a run was moved to; checks the places of output files."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from fgrlhf.data.fields import UserError, show
from fgrlhf.data.files import opened, read_json


class Kind(NamedTuple):
    """A kind of output file. A command writes over files of its own kind only."""

    name: str                           # for messages
    fits: Callable[[str], bool]         # tells whether the file at a path is of this kind


def records_with(name: str, *fields: str) -> Kind:
    """Returns the kind of the JSON files whose records all have these fields."""
    def fits(path: str) -> bool:
        try:
            return all(isinstance(value, dict) and value.keys() >= {*fields}
                       for _, value in read_json(path))
        except UserError:
            return False
    return Kind(name, fits)


def begins_with(name: str, text: str) -> Kind:
    """Returns the kind of the files that begin with this text, in upper or lower case."""
    return Kind(name, lambda path: _beginning(path, len(text)).lower() == text.lower())


ANSWERS = records_with("a file of answers", "instruction", "output", "generator")
HTML = begins_with("an HTML page", "<!doctype")


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


def refuse_outputs(outputs: Iterable[tuple[str, str | None, Kind | None]],
                   inputs: Iterable[tuple[str, str | None]]) -> None:
    """Raises UserError for an output file that would destroy something or cannot be written.

    outputs: (flag, path, kind). inputs: (flag, path). The path is None for a flag that was not
    given. An output may not be an input file, lie inside an input folder, or be another output or
    stdout. It may not write over a file of another kind, except an empty one; the kind None is for
    files that are read before they are written.
    """
    taken = [(os.path.realpath(path), name, path) for name, path in inputs if path is not None]
    for flag, path, kind in outputs:
        if path is None:
            continue
        place, expected = os.path.realpath(path), f"{flag} {path}: expected a file of its own, got"
        for other, name, given in taken:
            if place == other:
                raise UserError(f"{expected} the path of {name}; choose another path")
            if os.path.isdir(other) and place.startswith(os.path.join(other, "")):
                raise UserError(f"{expected} a path inside {name} {given}; choose another path")
        if os.path.exists(path) and not os.path.isfile(path):
            kind = "a folder" if os.path.isdir(path) else "a pipe or a device"
            raise UserError(f"{expected} {kind}; choose the path of a file")
        if _is_stdout(path):
            raise UserError(f"{expected} the file to which stdout goes; choose another path")
        if kind and os.path.exists(path) and os.path.getsize(path) and not kind.fits(path):
            raise UserError(f"{flag} {path}: expected a new file or {kind.name} to write over, got "
                            f"a file that begins with {show(_beginning(path, 80))}; choose another "
                            "path or move it")
        folder = next(str(p) for p in Path(place).parents if os.path.exists(p))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{flag} {path}: cannot be written ({folder} is no folder in which you "
                            "may write); choose another path")
        taken.append((place, flag, path))


def _beginning(path: str, size: int) -> str:
    with opened(path, gunzip=False) as file:
        return file.read(size).decode("utf-8", "replace")


def _is_stdout(path: str) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:                                 # there is no such file, or stdout is closed
        return False
