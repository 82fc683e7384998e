"""Shared fixtures. Third-party data is no part of the project: tests that need it skip without."""

import os
import signal
from pathlib import Path

import pytest
import torch

# A shell's background job ignores SIGINT, and so would the programs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data, from the environment variable FGRLHF_DATA."""
    path = os.environ.get("FGRLHF_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("needs real data, no part of the project; set FGRLHF_DATA to its folder")
    return Path(path)


@pytest.fixture(autouse=True)
def one_seed_and_one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)
