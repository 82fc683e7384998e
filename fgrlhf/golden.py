"""Golden fixtures for a port of the method to another framework or language.

    python -m fgrlhf.golden write DIR         the fixtures: inputs, expected outputs, tolerances
    python -m fgrlhf.golden check DIR         a port's outputs against them, as a table

    DIR/manifest.json                     each case: equation, formula, options, files, tolerance
    DIR/inputs/CASE/NAME.npy|.json        inputs/model holds the weights that several cases share
    DIR/expected/float64/CASE/NAME.npy    float32: the same, rounded; int64 and bool: exact
    DIR/outputs/CASE/NAME.npy             yours, in float64 or float32, which picks the tolerance

Real inputs are float32 and exact in either precision. An output passes when its shape is the
expected one and |got - expected| <= tolerance * max |expected| everywhere (integers and masks:
when equal). `check` ends with status 0 if every case passes, 1 if not, 2 if DIR is no such folder.

Arrays are .npy files, one each, little-endian and in C order: numpy reads them without a package,
the format is a page long and has readers for C++, Rust, Julia and JavaScript, and a folder listing
shows what a case consists of.
"""

import io
import json
import sys
from pathlib import Path

import numpy
import torch

from fgrlhf.config import UserError, run
from fgrlhf.files import write_atomic
from fgrlhf.fixtures import (advantage, alignment, likelihood, policy, preference, text,
                             transformer)
from fgrlhf.fixtures.case import Case
from fgrlhf.fixtures.compare import FORMAT, check, table

ABOUT = ("Put each output at outputs/CASE/NAME.npy, in float64 or float32 (ids int64, masks bool), "
         "and run `python -m fgrlhf.golden check` on this folder. It passes when |got - expected| "
         "<= tolerance * max |expected|, by the tolerance of its dtype. [B, T] and the like are "
         "shapes; where a case says model, the weights below are inputs too.")
OWN = {"manifest.json", "inputs", "expected", "outputs"}
GROUPS = (text, alignment, transformer, likelihood, preference, advantage, policy)


def cases() -> list[Case]:
    """Every case, computed now, on one thread: with several the last bits of a sum may vary."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [case for group in GROUPS for case in group.cases()]
    finally:
        torch.set_num_threads(threads)


def write(folder: Path) -> int:
    """Write the fixtures; returns the number of cases. The same bytes each time on one machine."""
    if folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= OWN):
        raise UserError(f"{folder}: expected a new or empty folder, or one with fixtures; "
                        "choose another")
    (folder / "manifest.json").unlink(missing_ok=True)         # written last: whole or no fixtures
    made = cases()
    model = {"config": transformer.CONFIG,
             "weights": {name: write_input(folder, "model", name, tensor)
                         for name, tensor in transformer.weights().items()}}
    entries = [{
        "name": case.name, "section": case.section, "equation": case.equation,
        "computes": case.computes, "model": case.model, "options": case.options,
        "inputs": {name: write_input(folder, case.name, name, value)
                   for name, value in case.inputs.items()},
        "outputs": {name: write_output(folder, case.name, name, value)
                    for name, value in case.outputs.items()},
        "tolerance": {"float64": case.float64, "float32": case.float32},
    } for case in made]
    manifest = {"format": FORMAT, "about": ABOUT, "model": model, "cases": entries}
    write_atomic(folder / "manifest.json",
                 (layout(manifest) + "\n").encode())
    return len(made)


def layout(value, indent: str = "") -> str:
    """JSON to read: what fits a line is one line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent + line) <= 160 or not isinstance(value, (dict, list)):
        return line
    deeper = indent + " "
    if isinstance(value, list):
        rows, ends = [layout(item, deeper) for item in value], "[]"
    else:
        rows, ends = [f"{json.dumps(name)}: {layout(item, deeper)}"
                      for name, item in value.items()], "{}"
    return f"{ends[0]}\n{deeper}" + f",\n{deeper}".join(rows) + f"\n{indent}{ends[1]}"


def write_input(folder: Path, case: str, name: str, value) -> dict:
    """A real tensor as float32, ids and masks as they are, anything else as JSON."""
    stem = f"inputs/{case}/{name}"
    if not isinstance(value, torch.Tensor):
        text = json.dumps(value, ensure_ascii=False) + "\n"
        write_file(folder / f"{stem}.json", text.encode())
        return {"dtype": "json", "file": f"{stem}.json"}
    array = value.numpy()
    if array.dtype == numpy.float64:
        assert (array == array.astype(numpy.float32)).all(), f"{stem}: not exact in float32"
        array = array.astype(numpy.float32)
    return write_array(folder, f"{stem}.npy", array)


def write_output(folder: Path, case: str, name: str, value: torch.Tensor) -> dict:
    """{dtype: {dtype, shape, file}}: float64 and float32, or the one exact dtype."""
    array = value.detach().numpy()
    dtypes = ("float64", "float32") if array.dtype == numpy.float64 else (str(array.dtype),)
    return {dtype: write_array(folder, f"expected/{dtype}/{case}/{name}.npy", array.astype(dtype))
            for dtype in dtypes}


def write_array(folder: Path, file: str, array: numpy.ndarray) -> dict:
    data = io.BytesIO()
    numpy.save(data, numpy.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    write_file(folder / file, data.getvalue())
    return {"dtype": str(array.dtype), "shape": list(array.shape), "file": file}


def write_file(path: Path, data: bytes) -> None:
    """Not synced: hundreds of files, good for nothing without the manifest."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); "
                        "choose another folder") from None


def main() -> None:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "check"):
        raise UserError(f"expected `write DIR` or `check DIR`, got {' '.join(sys.argv[1:])!r}; "
                        "see --help")
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "write":
        print(f"{folder}: {write(folder)} cases")
        return
    verdicts = check(folder)
    passed = sum(v.verdict == "pass" for v in verdicts)
    print(table(verdicts))
    print(f"{passed} of {len(verdicts)} cases pass")
    if passed < len(verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
