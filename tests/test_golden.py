"""The golden fixtures: the same bytes each time; the numpy port passes; every planted error fails.

The port (tests/numpy_port.py) is an example of any port. Its source is changed in one place and run
again, and `check` must notice the error in the case that it concerns, in float64 and in float32.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import run
from fgrlhf.golden import __main__ as golden
from fgrlhf.golden.compare import FORMAT, check, compare, errors, first_beyond, judge
from tests import numpy_port
from tests.planted_errors import PLANTS
from tests.processes import ROOT

PORT = Path(numpy_port.__file__)
SOURCE = PORT.read_text()

# The sha256 of all inputs, with the trained vocabulary, and of the manifest without its prose.
# Expected values are left out, because their last bits differ between machines; the port checks
# them.
HASH = "ece1a5eca0b3af83c4b021e8c3ecec273e23eab702f9febe7294c3b16463a865"

DTYPES = ("float64", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    golden.write(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def case_of(manifest: dict, name: str) -> dict:
    return next(case for case in manifest["cases"] if case["name"] == name)


def put(folder: Path, case: str, outputs: dict) -> None:
    shutil.rmtree(folder / "outputs", ignore_errors=True)
    (folder / "outputs" / case).mkdir(parents=True)
    for name, array in outputs.items():
        np.save(folder / "outputs" / case / f"{name}.npy", array)


def verdict(folder: Path, manifest: dict, case: str, outputs: dict) -> str:
    put(folder, case, outputs)
    return judge(folder, case_of(manifest, case)).verdict


# ----- write --------------------------------------------------------------------------------------

def test_write_gives_the_same_bytes_each_time_in_a_small_folder(folder, tmp_path):
    golden.write(tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert sum((tmp_path / file).stat().st_size for file in files) < 400_000
    assert not [file for file in files
                if (tmp_path / file).read_bytes() != (folder / file).read_bytes()]


def test_write_has_changed_no_case_and_no_input(folder, manifest):
    """A change here breaks ports that passed before: renew the hash and say so in the commit."""
    prose = ("computes", "section", "equation")
    facts = [{name: fact for name, fact in case.items() if name not in prose}
             for case in manifest["cases"]]
    digest = hashlib.sha256(json.dumps([manifest["format"], manifest["model"], facts]).encode())
    for path in sorted((folder / "inputs").rglob("*.*")):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == HASH


def test_write_describes_every_file(folder, manifest):
    entries = list(manifest["model"]["weights"].values())
    for case in manifest["cases"]:
        assert case["computes"] and case["section"] and case["equation"]
        assert set(case["tolerance"]) == set(DTYPES)
        entries += case["inputs"].values()
        entries += [entry for output in case["outputs"].values() for entry in output.values()]
    for entry in entries:
        if entry["dtype"] == "json":
            json.loads((folder / entry["file"]).read_text())
        else:
            array = np.load(folder / entry["file"], allow_pickle=False)
            assert (str(array.dtype), list(array.shape)) == (entry["dtype"], entry["shape"])
            assert np.isfinite(array).all() and array.flags.c_contiguous
            assert array.dtype.newbyteorder("<") == array.dtype
    names = {entry["file"] for entry in entries} | {"manifest.json"}
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")
            if not path.is_relative_to(folder / "outputs")}
    assert kept == names


def test_write_refuses_a_folder_with_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        golden.write(tmp_path)
    with pytest.raises(UserError, match="expected a new or empty folder"):
        golden.write(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def loaded_by(line: str) -> set[str]:
    """The modules that a fresh process loads when it runs `line`."""
    code = f"import sys; before = set(sys.modules); {line}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return set(done.stdout.split())


def test_the_fixtures_load_no_code_that_trains():
    """Only the tokenizer is shared, because sentencepiece is its only implementation."""
    loaded = {name for name in loaded_by("import fgrlhf.golden.__main__")
              if name.split(".")[0] in ("fgrlhf", "kernels")}
    assert {name for name in loaded if not name.startswith(("fgrlhf.golden", "fgrlhf.data"))} == {
        "fgrlhf", "fgrlhf.engine", "fgrlhf.engine.config", "fgrlhf.layouts", "fgrlhf.layouts.kinds",
        "fgrlhf.tokenizer"}


# ----- the port -----------------------------------------------------------------------------------

def test_the_port_loads_only_numpy_and_the_standard_library():
    loaded = {name.split(".")[0] for name in loaded_by("import tests.numpy_port")}
    assert loaded - set(sys.stdlib_module_names) == {"numpy", "tests"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_port_passes_every_case(folder, dtype):
    shutil.rmtree(folder / "outputs", ignore_errors=True)
    numpy_port.main(folder, np.dtype(dtype))
    verdicts = check(folder)
    assert [v for v in verdicts if v.verdict != "pass"] == []
    limit = {"float64": 1e-13, "float32": 5e-6}[dtype]
    assert max(v.relative for v in verdicts) < limit          # well inside the tolerances
    arrays = [np.load(path) for path in (folder / "outputs").rglob("*.npy")]
    assert {str(a.dtype) for a in arrays} == {dtype, "int64", "bool"}


def test_every_case_has_planted_errors_of_each_kind(manifest):
    assert set(PLANTS) == {case["name"] for case in manifest["cases"]}
    for case, plants in PLANTS.items():
        assert {what.split(":")[0] for what in plants} == {"shift", "mask", "sign", "scale"}, case


@pytest.mark.parametrize("case, what", [(case, what) for case in PLANTS for what in PLANTS[case]])
def test_check_catches_an_error_planted_in_the_port(folder, manifest, case, what):
    old, new = PLANTS[case][what]
    assert SOURCE.count(old) == 1, f"found {SOURCE.count(old)} times in the port: {old}"
    port = types.ModuleType("port")
    exec(compile(SOURCE.replace(old, new), str(PORT), "exec"), port.__dict__)
    for dtype in DTYPES:
        with np.errstate(all="ignore"):
            outputs = port.answer(folder, manifest, case_of(manifest, case), np.dtype(dtype))
        assert verdict(folder, manifest, case, outputs).startswith("FAIL"), dtype


WRONG = {"shift": lambda x: np.roll(x, 1), "sign": lambda x: -x, "scale": lambda x: x * 1.001,
         "mask": lambda x: np.where(np.arange(x.size).reshape(x.shape) % 2, x, 0)}


@pytest.mark.parametrize("case", PLANTS)
def test_check_catches_any_array_shifted_masked_negated_or_scaled(folder, manifest, case):
    """Each array of the case in turn. A change that leaves an array as it is does not count."""
    entry = case_of(manifest, case)
    for dtype in DTYPES:
        right = numpy_port.answer(folder, manifest, entry, np.dtype(dtype))
        for name, array in right.items():
            wrong = [np.asarray(spoil(array * 1)).astype(array.dtype) for spoil in WRONG.values()]
            for got in [array, *(other for other in wrong if not np.array_equal(other, array))]:
                found = compare(folder, entry, name, np.asarray(got))
                assert (found.relative <= found.tolerance) == (got is array), name


# ----- check --------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, expected", [
    (np.float16(1.0), "FAIL: loss: expected float64 or float32, got float16"),
    (np.int64(1), "FAIL: loss: expected float64 or float32, got int64"),
    (np.zeros(1), r"FAIL: loss: expected shape \(\), got \(1,\)"),
    (np.float64("nan"), r"FAIL: loss: off by inf, first at \[\]: expected -?[\d.]+, got nan"),
    (np.array({}), r"FAIL: loss: not a plain .npy file \(ValueError\)"),
    (None, r"FAIL: loss: missing"),
])
def test_check_says_why_an_output_fails(folder, manifest, loss, expected):
    outputs = numpy_port.answer(folder, manifest, case_of(manifest, "clipped-loss"))
    outputs["loss"] = loss
    if loss is None:
        del outputs["loss"]
    put(folder, "clipped-loss", outputs)
    assert re.fullmatch(expected, judge(folder, case_of(manifest, "clipped-loss")).verdict)


def test_check_wants_exact_integers_in_any_integer_type(folder, manifest):
    right = numpy_port.answer(folder, manifest, case_of(manifest, "align-token"))
    small = {name: array.astype(np.int32) for name, array in right.items()}
    assert verdict(folder, manifest, "align-token", small) == "pass"
    small["distance"] = small["distance"] + 1
    assert verdict(folder, manifest, "align-token", small) == (
        "FAIL: distance: off by 2.5e-01, first at [0]: expected 1, got 2")
    small["distance"] = right["distance"].copy()
    small["distance"][[5, 9]] += 1
    assert verdict(folder, manifest, "align-token", small) == (
        f"FAIL: distance: off by 2.5e-01, first at [5]: expected {right['distance'][5]}, got "
        f"{right['distance'][5] + 1}")
    small["distance"] = right["distance"].astype(np.float64)
    assert "distance: expected int64" in verdict(folder, manifest, "align-token", small)


def test_errors_by_hand():
    assert errors(np.array([1.0, 4.5]), np.array([1.0, 5.0])) == (0.5, 0.1)
    assert errors(np.zeros(3), np.zeros(3)) == (0.0, 0.0)
    assert errors(np.full(1, 1e-30), np.zeros(1)) == (1e-30, float("inf"))
    assert errors(np.array([np.inf]), np.array([1.0])) == (float("inf"), float("inf"))
    assert errors(np.zeros((0, 2)), np.zeros((0, 2))) == (0.0, 0.0)


def test_first_beyond_names_the_first_element_that_is_too_far_off():
    """The tolerance is relative to the largest expected number, here 8."""
    wanted = np.array([[1.0, -8.0], [0.5, 2.0]])
    got = wanted + np.array([[0.079, 0.0], [0.081, 1.0]])
    assert first_beyond(got, wanted, 0.01) == "at [1, 0]: expected 0.5, got 0.581"
    assert first_beyond(got, wanted, 0.2) == ""
    assert first_beyond(wanted * np.nan, wanted, 1.0) == "at [0, 0]: expected 1.0, got nan"
    masks = np.array([True, False])
    assert first_beyond(~masks, masks, 0.0) == "at [0]: expected True, got False"
    assert first_beyond(np.float32(0.2), np.float32(0.1), 1e-5) == "at []: expected 0.1, got 0.2"
    assert first_beyond(np.zeros((0, 2)), np.zeros((0, 2)), 0.0) == ""


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["golden", *map(str, arguments)])
    with pytest.raises(SystemExit) as status:
        run(golden.main)
        raise SystemExit(0)
    return status.value.code


def test_main_writes_and_checks_with_a_status(folder, monkeypatch, capsys):
    numpy_port.main(folder)
    assert command(monkeypatch, "check", folder) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"{len(PLANTS)} of {len(PLANTS)} cases pass" and len(out) == len(PLANTS) + 3
    shutil.rmtree(folder / "outputs" / "gae")
    np.save(folder / "outputs" / "rope" / "y.npy", np.zeros(3))
    assert command(monkeypatch, "check", folder) == 1
    out = capsys.readouterr().out
    assert f"{len(PLANTS) - 2} of {len(PLANTS)} cases pass" in out
    row = next(line for line in out.splitlines() if line.startswith("gae "))
    assert row.split() == ["gae", "GAE", "-", "-", "-", "missing"]
    assert "FAIL: y: expected shape (5, 2, 8), got (3,)" in out


@pytest.mark.parametrize("manifest_text", [None, "", "[]", '{"format": "another"}',
                                           '{"format": "%s"}' % FORMAT,
                                           '{"format": "%s", "cases": [{}]}' % FORMAT])
def test_main_refuses_a_folder_without_fixtures_in_one_line(tmp_path, monkeypatch, capsys,
                                                            manifest_text):
    if manifest_text is not None:
        (tmp_path / "manifest.json").write_text(manifest_text)
    assert command(monkeypatch, "check", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "write it again with" in err


def test_main_refuses_damaged_fixtures_and_bad_arguments_in_one_line(folder, tmp_path, monkeypatch,
                                                                     capsys):
    numpy_port.main(folder)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "expected/float64/gae/returns.npy").write_bytes(b"no array")
    assert command(monkeypatch, "check", tmp_path) == 2
    assert "returns.npy: not a plain .npy file" in capsys.readouterr().err
    (tmp_path / "expected/float64/gae/returns.npy").unlink()
    assert command(monkeypatch, "check", tmp_path) == 2
    assert "returns.npy: not a plain .npy file" in capsys.readouterr().err
    for arguments in ([], ["check"], ["compare", tmp_path], ["check", tmp_path, "more"]):
        assert command(monkeypatch, *arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ----- README.md ----------------------------------------------------------------------------------

README = (ROOT / "fgrlhf/golden/README.md").read_text()


def test_readme_lists_every_case_and_no_other():
    table = README.split("## The cases")[1]
    assert sorted(re.findall(r"`([\w-]+)`", table)) == sorted(PLANTS)


def test_readme_commands_and_example_give_what_it_says(tmp_path):
    """The commands write as many files as it says and every case passes; the example does too."""
    def python(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    here = lambda text: text.replace("runs/golden", str(tmp_path))
    write, port, check_it = (here(line).split("#")[0].split()[1:]
                             for line in README.split("```")[1].strip().splitlines())
    python(*write)
    files = [path for path in tmp_path.rglob("*.*")]
    assert f"{len(files)} files, {sum(p.stat().st_size for p in files) / 1000:.0f} KB" in README
    python(*port)
    assert f"`{python(*check_it).splitlines()[-1]}`" in README
    shutil.rmtree(tmp_path / "outputs")
    python("-c", here(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]))
    row, = (v for v in check(tmp_path) if v.verdict == "pass")
    assert row.case == "advantages"
