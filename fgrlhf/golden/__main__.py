"""Writes golden fixtures for a port to another framework or language, and checks the port.

    python -m fgrlhf.golden write DIR         the fixtures: inputs, expected outputs, tolerances
    python -m fgrlhf.golden check DIR         compares a port's outputs with them, as a table

    DIR/manifest.json                     each case: equation, formula, options, files, tolerance
    DIR/inputs/CASE/NAME.npy|.json        inputs/model holds the weights that several cases share
    DIR/expected/float64/CASE/NAME.npy    also float32 (the same numbers, rounded), int64 and bool
    DIR/outputs/CASE/NAME.npy             the port's, in float64 or float32

An output passes when its shape is the expected shape and |got - expected| <= tolerance * max
|expected| everywhere, with the tolerance of the output's dtype. Integers and masks must be equal.
`check` ends with status 0 when every case passes, 1 when a case does not, and 2 when DIR holds no
fixtures. fgrlhf/golden/README.md explains how to port.
"""

import argparse
import io
import json
from pathlib import Path

import numpy
import torch

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import write_atomic
from fgrlhf.engine.config import OneLineParser, program, run
from fgrlhf.golden import advantage, alignment, likelihood, policy, preference, text, transformer
from fgrlhf.golden.case import Case
from fgrlhf.golden.compare import FORMAT, check, table

ABOUT = ("Write each output to outputs/CASE/NAME.npy, in float64 or float32 (ids in int64, masks "
         "in bool), and run `python -m fgrlhf.golden check` on this folder. An output passes when "
         "|got - expected| <= tolerance * max |expected|, with the tolerance of its dtype. [B, T] "
         "and the like are shapes. Where `model` of a case is true, the weights below are inputs "
         "too.")
CONTENTS = {"manifest.json", "inputs", "expected", "outputs"}
GROUPS = (text, alignment, transformer, likelihood, preference, advantage, policy)


def cases() -> list[Case]:
    """Computes every case. One thread is used: with several the last bits of a sum may vary."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [case for group in GROUPS for case in group.cases()]
    finally:
        torch.set_num_threads(threads)


def write(folder: Path) -> int:
    """Writes the fixtures and returns the number of cases.

    One machine writes the same bytes each time. Raises UserError when the folder holds other files.
    """
    if folder.exists() and not (folder.is_dir()
                                and {path.name for path in folder.iterdir()} <= CONTENTS):
        raise UserError(f"{folder}: expected a new or empty folder, or one with fixtures, got "
                        "other files; choose another folder")
    # The manifest is written last, so a stopped run leaves no fixtures instead of half of them.
    (folder / "manifest.json").unlink(missing_ok=True)
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
    write_atomic(folder / "manifest.json", (layout(manifest) + "\n").encode())
    return len(made)


def layout(value, indent: str = "") -> str:
    """JSON for reading: anything that fits on one line is on one line."""
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
    """Writes real tensors as float32, ids and masks in their own dtype, anything else as JSON.

    Returns the entry of the manifest, {dtype, shape, file}; JSON has no shape.
    """
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
    """Writes real tensors in float64 and float32, others in their own dtype.

    Returns the entry of the manifest for each dtype.
    """
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
    """Writes without fsync: the file counts for nothing until the manifest is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); "
                        "choose another folder") from None


def main() -> None:
    parser = OneLineParser(prog=program(), description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("write", "check"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    options = parser.parse_args()
    if options.command == "write":
        print(f"{options.folder}: {write(options.folder)} cases")
        return
    verdicts = check(options.folder)
    passed = sum(v.verdict == "pass" for v in verdicts)
    print(table(verdicts))
    print(f"{passed} of {len(verdicts)} cases pass")
    if passed < len(verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
