"""Shared fixtures, and the claims by which several workers share one test run.

Third-party data is not part of the project: tests that need it skip without it.
"""

import os
import signal
from pathlib import Path

import pytest
import torch

CLAIMS = os.environ.get("FGRLHF_TEST_CLAIMS")       # a folder, set by `python -m tests`
# The files that take longest are claimed first, so that the workers end at about the same time.
SLOW = ("test_distributed", "test_killed", "test_plan", "test_tutorial", "test_collect_page",
        "test_reproduce_killed", "test_readme_commands", "test_scripts", "test_mutations",
        "test_collect_judge_page")

# A shell's background job ignores SIGINT, and so would the programs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data, from the environment variable FGRLHF_DATA."""
    path = os.environ.get("FGRLHF_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("needs real data, which is not part of the project; set FGRLHF_DATA to its "
                    "folder")
    return Path(path)


@pytest.fixture(autouse=True)
def one_seed_and_one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


# ----- several workers ----------------------------------------------------------------------------

def pytest_collection_modifyitems(items):
    if CLAIMS:
        order = {name: number for number, name in enumerate(SLOW)}
        items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))


def claim(name: str) -> bool:
    """Whether this worker has the test file: the first to ask gets it."""
    path = Path(CLAIMS, name)
    try:
        path.touch(exist_ok=False)
        path.write_text(str(os.getpid()))
        return True
    except FileExistsError:
        return path.read_text() == str(os.getpid())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Passes over the tests of files that another worker has claimed."""
    if CLAIMS and not claim(item.path.stem):
        return True
    return None


def pytest_runtest_teardown(item, nextitem):
    """Marks a file as finished, for the bar."""
    if CLAIMS and (nextitem is None or nextitem.path != item.path):
        Path(CLAIMS, item.path.stem + ".done").touch()
