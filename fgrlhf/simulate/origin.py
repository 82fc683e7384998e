"""Checks that a file is of the world that --world names, so that no knob is forgotten.

    {"id": "dev-0", "prompt": "Name the crop of Toran.", "dataset": "world 3,coupled=1"}

A world with a knob that is not at its default writes its name as the `dataset` of its prompts and
demonstrations. Answers get the key from their prompts, and the annotators write it into pairs and
edits. A default world writes no key. A name of another kind, such as "koala", says nothing here.
"""

import re
import sys
from collections.abc import Iterable

from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Output
from fgrlhf.simulate.world import World

NAME = re.compile(r"world (-?\d+(?:,\w+=[\w.+-]+)*)")


def check_requests(world: World, records: Iterable, file: str | None = None) -> None:
    """Raises UserError for a record that names another world, or that is no request of `world`.

    records: answers, or records with a `prompt`; each has a `dataset`. file: where they come from;
    None for records that were checked before. When `world` has knobs and a file does not name its
    world, stderr says so: the file may be of the default world, or older than the key.
    """
    silent, total = 0, 0
    for total, record in enumerate(records, 1):
        text = record.instruction if isinstance(record, Output) else record.prompt
        place = f"{file or 'outputs'}: record {repr(record.id) if record.id else total}"
        named = NAME.fullmatch(record.dataset or "")
        if named and named[0] != world.name:
            raise UserError(f"{place}: dataset: expected {world.name}, which --world gives, got "
                            f"{named[0]}; give --world {named[1]}, or a file of {world.name}")
        if not world.items(text):
            raise UserError(f"{place}: found no request of {world.name} in {text[:60]!r}; give the "
                            "--world of the prompts")
        silent += not named
    if silent and world.dataset and file:
        print(f"{file}: {silent} of {total} records do not say which world they are of; the "
              f"result is right only if it is {world.name}", file=sys.stderr)
