"""Shared fixtures. Third-party data is never part of the project: tests that need it skip without it."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data: $FGRLHF_DATA, else ../shared/data beside the checkout."""
    path = Path(os.environ.get("FGRLHF_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}; set FGRLHF_DATA to run this test")
    return path


@pytest.fixture(autouse=True)
def one_seed_and_one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)
