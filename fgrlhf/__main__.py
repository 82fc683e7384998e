"""Lists the commands of the project, one line each.

    python -m fgrlhf
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import run

PACKAGE = Path(__file__).parent
SCRIPTS = ("train_rm.py", "train_ppo.py", "eval.py")


def commands() -> Iterator[tuple[str, str]]:
    """Yields each command as one types it, with the first line of its docstring."""
    files = [PACKAGE.parent / name for name in SCRIPTS]
    files += sorted(path for path in (*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py"))
                    if path != Path(__file__) and '\nif __name__ == "__main__"' in path.read_text())
    for path in files:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__main__")
        command = path.name if path.name in SCRIPTS else f"-m {name}"
        line = ast.get_docstring(ast.parse(path.read_text())).split("\n")[0]
        yield f"python {command}", line


def main() -> None:
    """Prints the list. Raises UserError when the command line has a word."""
    if sys.argv[1:] not in ([], ["-h"], ["--help"]):
        raise UserError(f"{sys.argv[1]!r}: expected no word after python -m fgrlhf, which only "
                        "lists the commands; type a command of its list, as python -m fgrlhf.sft")
    listed = list(commands())
    width = max(len(command) for command, _ in listed) + 2
    for command, line in listed:
        print(f"{command:{width}}{line}")


if __name__ == "__main__":
    run(main)
