"""Runs the whole test suite on all cores: `python -m tests`, with pytest's options behind it.

Each worker is a pytest of its own that claims one test file after another (conftest.py). The bar
counts finished files; at the end each worker's failures, skips and totals are printed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def main(options: list[str], workers: int) -> int:
    """Returns 0 when every worker passed, else the highest exit status."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"FGRLHF_TEST_CLAIMS": folder, "OMP_NUM_THREADS": "1"}
        outputs = [Path(folder, f"output-{number}") for number in range(workers)]
        processes = [subprocess.Popen([sys.executable, "-m", "pytest", "-p", "no:cacheprovider",
                                       *options], cwd=ROOT, env=environment, text=True,
                                      stdout=open(output, "w"), stderr=subprocess.STDOUT)
                     for output in outputs]
        files = len(list((ROOT / "tests").glob("test_*.py")))
        with tqdm(total=files, unit="file", desc=f"tests on {workers} cores") as bar:
            while any(process.poll() is None for process in processes):
                time.sleep(0.2)
                if finished := len(list(Path(folder).glob("*.done"))) - bar.n:
                    bar.update(finished)
        for output in outputs:
            print(output.read_text())
        return max(abs(process.returncode) for process in processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.cpu_count() or 1))
