"""Compares a port's outputs with the expected ones: one verdict per case, and a table of all.

    relative error of an array    max |got - expected| / max |expected|

An array passes when its shape is the expected shape and its relative error is within the tolerance
of its own dtype. Integers and masks pass when they are equal.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy

from fgrlhf.data.fields import UserError

FORMAT = "fgrlhf golden fixtures, version 1"


class Verdict(NamedTuple):
    """One row of the table."""

    case: str
    equation: str
    absolute: float                     # the largest |got - expected|; NaN: nothing was compared
    relative: float                     # the largest relative error of an array
    tolerance: float                    # the widest that was applied; 0: exact, NaN: none
    verdict: str                        # "pass", "missing" or "FAIL: reason"


class Errors(NamedTuple):
    """The errors of one array, as in Verdict."""

    absolute: float
    relative: float
    tolerance: float                    # of `relative`; 0 for integers and masks
    first: str = ""                     # the first element beyond it, such as "at [3, 0]: ..."


class Mismatch(ValueError):
    """The reason why an output cannot be compared."""


def check(folder: Path) -> list[Verdict]:
    """Judges every case, in the order of the manifest.

    Raises UserError when the folder holds no fixtures or they are damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: expected a manifest.json of `{FORMAT}`, found none; write it "
                        "again with `python -m fgrlhf.golden write`")
    try:
        return [judge(folder, case) for case in manifest["cases"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'manifest.json'}: damaged ({type(error).__name__}: {error}); "
                        "write it again with `python -m fgrlhf.golden write`") from None


def judge(folder: Path, case: dict) -> Verdict:
    """Compares all outputs of one case."""
    compared, faults, missing = [], [], []
    for name in case["outputs"]:
        path = folder / "outputs" / case["name"] / f"{name}.npy"
        if not path.exists():
            missing.append(f"{name}: missing")
            continue
        try:
            compared.append(compare(folder, case, name, read_array(path)))
        except Mismatch as mismatch:
            faults.append(f"{name}: {mismatch}")
            continue
        if not compared[-1].relative <= compared[-1].tolerance:
            faults.append(f"{name}: off by {compared[-1].relative:.1e}, first {compared[-1].first}")
    if len(missing) == len(case["outputs"]):
        verdict = "missing"
    else:
        faults += missing
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        verdict = f"FAIL: {faults[0]}{more}" if faults else "pass"
    worst = [max(column) for column in list(zip(*compared))[:3]] or 3 * [float("nan")]
    return Verdict(case["name"], case["equation"], *worst, verdict)


def read_array(path: Path) -> numpy.ndarray:
    """Reads an array without ever running code from the file. Raises Mismatch for anything else."""
    try:
        return numpy.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise Mismatch(f"not a plain .npy file ({type(error).__name__})") from None


def compare(folder: Path, case: dict, name: str, got: numpy.ndarray) -> Errors:
    """Compares one output with the expected array of its dtype.

    Raises Mismatch when dtype or shape differ, and UserError when the expected array is damaged.
    """
    expected = case["outputs"][name]
    exact = next((dtype for dtype in ("int64", "bool") if dtype in expected), None)
    dtype = str(got.dtype) if exact is None else exact
    kinds = {"int64": "iu", "bool": "biu"}.get(exact, "f")
    if dtype not in expected or got.dtype.kind not in kinds:
        raise Mismatch(f"expected {' or '.join(expected)}, got {got.dtype}")
    path = folder / expected[dtype]["file"]
    try:
        wanted = read_array(path)
    except Mismatch as error:
        raise UserError(f"{path}: {error}; write the fixtures again with "
                        "`python -m fgrlhf.golden write`") from None
    if got.shape != wanted.shape:
        raise Mismatch(f"expected shape {wanted.shape}, got {got.shape}")
    tolerance = 0.0 if exact else case["tolerance"][dtype]
    return Errors(*errors(got, wanted), tolerance, first_beyond(got, wanted, tolerance))


def first_beyond(got: numpy.ndarray, wanted: numpy.ndarray, tolerance: float) -> str:
    """Names the first element, in C order, that is beyond the tolerance: index and both values."""
    if got.size == 0:
        return ""
    exact = wanted.astype(numpy.float64)
    with numpy.errstate(invalid="ignore"):                      # inf - inf
        near = numpy.abs(got.astype(numpy.float64) - exact) <= tolerance * numpy.abs(exact).max()
    beyond = numpy.argwhere(~near)
    if not len(beyond):
        return ""
    index = tuple(map(int, beyond[0]))
    return f"at {list(index)}: expected {wanted[index]!s}, got {got[index]!s}"


def errors(got: numpy.ndarray, wanted: numpy.ndarray) -> tuple[float, float]:
    """Returns (absolute, relative): max |got - wanted|, and the same over max |wanted|.

    Both are infinite when a number is not finite. When only zeros are expected, the relative error
    of any other number is infinite.
    """
    if got.size == 0:
        return 0.0, 0.0
    difference = numpy.abs(got.astype(numpy.float64) - wanted.astype(numpy.float64))
    worst = float(difference.max()) if numpy.isfinite(difference).all() else float("inf")
    largest = float(numpy.abs(wanted.astype(numpy.float64)).max())
    return worst, worst / largest if largest else (float("inf") if worst else 0.0)


def table(verdicts: list[Verdict]) -> str:
    """The verdicts as text, one aligned line per case."""
    number = lambda value: "-" if value != value else f"{value:.1e}" if value else "0"
    limit = lambda tolerance: "exact" if tolerance == 0 else number(tolerance)
    rows = [("case", "equation", "absolute error", "relative error", "tolerance", "verdict")]
    rows += [(v.case, v.equation, number(v.absolute), number(v.relative), limit(v.tolerance),
              v.verdict) for v in verdicts]
    width = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = ["  ".join([*(row[k].ljust(width[k]) for k in (0, 1)),
                        *(row[k].rjust(width[k]) for k in (2, 3, 4)), row[5]]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
