"""The human editor: one page on the loopback interface where a person edits the responses."""

from dataclasses import dataclass

from fgrlhf.collecting.store import Store
from fgrlhf.collecting.tasks import Task
from fgrlhf.config import UserError


@dataclass(frozen=True)
class Options:
    """What the command line says about the page."""

    max_change: float                             # largest share of changed words, in (0, 1]
    host: str = "127.0.0.1"
    port: int = 0                                 # 0: any free one
    allow_remote: bool = False


def serve(tasks: list[Task], store: Store, options: Options) -> None:
    """Serve the page until every task has a record or the user stops the program."""
    raise UserError("--editor human: the page is not part of this version yet; "
                    "use --editor llm or simulated")
