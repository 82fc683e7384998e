"""`pip install .`: a wheel in a fresh environment carries every file, and runs from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.test_layout import ROOT

SOURCES = ("fgrlhf", "kernels", "train_rm.py", "train_ppo.py", "eval.py", "pyproject.toml",
           "requirements.txt", "README.md", "LICENSE")


def run(*command, folder: Path) -> subprocess.CompletedProcess:
    """In `folder`, with nothing of this environment's own paths."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(list(map(str, command)), cwd=folder, env=kept, text=True,
                          capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of a fresh environment that holds the wheel, and this environment's packages."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    built = run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source,
                folder=folder)
    if built.returncode and "setuptools" in built.stderr:
        pytest.skip("needs a package index to fetch setuptools from")
    assert built.returncode == 0, built.stderr
    wheel, = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    installed = run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet",
                    "--no-deps", wheel, folder=folder)
    assert installed.returncode == 0, installed.stderr
    site, = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_an_installed_package_carries_every_file(python, tmp_path):
    code = ("import fgrlhf, pathlib; folder = pathlib.Path(fgrlhf.__file__).parent; "
            "print(*sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file() "
            "and p.suffix != '.pyc'), sep='\\n')")
    done = run(python, "-c", code, folder=tmp_path)
    tracked = {str(path.relative_to(ROOT / "fgrlhf")) for path in (ROOT / "fgrlhf").rglob("*")
               if path.is_file() and path.suffix != ".pyc"}
    assert tracked <= set(done.stdout.split()), done.stderr


def test_the_list_of_commands_survives_a_reader_that_goes_away_and_refuses_a_word():
    with subprocess.Popen([sys.executable, "-m", "fgrlhf"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait() == 141 and process.stderr.read() == b""
    done = run(sys.executable, "-m", "fgrlhf", "sft", folder=ROOT)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: 'sft': expected no word after python -m fgrlhf")


def test_the_list_of_commands_imports_no_torch():
    code = "import sys, fgrlhf.__main__; print('torch' in sys.modules)"
    assert run(sys.executable, "-c", code, folder=ROOT).stdout == "False\n"


def test_an_installed_package_runs_from_any_folder(python, tmp_path):
    """The commands, the page of `explain`'s report, and a stage of the pipeline."""
    for module in ("fgrlhf", "fgrlhf.sft", "fgrlhf.collect", "fgrlhf.explain", "train_ppo", "eval"):
        done = run(python, "-m", module, *["--help"] * (module != "fgrlhf"), folder=tmp_path)
        assert done.returncode == 0 and done.stdout, (module, done.stderr)
    done = run(python, "-m", "fgrlhf.simulate", "world", "--demonstrations", 300, "--train", 9,
               "--dev", 2, "--test", 2, "--out", "world", folder=tmp_path)
    assert done.returncode == 0 and (tmp_path / "world/tokenizer.model").exists(), done.stderr
    code = ("import pathlib; from fgrlhf.reproduce.pipeline import Stage, run_stages; "
            "from fgrlhf.reproduce.report import write_report; write_report('r.html', {}); "
            "run_stages([Stage('help', ('train_rm.py', '--help'))], pathlib.Path('out'), 1)")
    done = run(python, "-c", code, folder=tmp_path)
    assert done.returncode == 0 and (tmp_path / "r.html").exists(), done.stderr
    assert "--data" in (tmp_path / "out/logs/help.log").read_text()
