"""Compares a collection that was begun earlier with its input, so that no edit meets another text.

Older versions named a record without an id by its line number: "pairs.jsonl:3" or "pairs.json:
record 3". Such an edit is recognised by its prompt and its response, wherever the line is now.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fgrlhf.collect.desk import Draft, drafts_path
from fgrlhf.collect.store import Skip, skipped_path
from fgrlhf.collect.tasks import Task, content_of
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Edit

LINE_NUMBER = re.compile(r"(.+):(?: record)? ?\d+")


def resumed(tasks: list[Task], records: Iterable[Edit | Skip | Draft], out: str | Path,
            pairs: str | Path) -> list[Task]:
    """Returns the tasks. A task that an older version finished gets the id of its record.

    records: what earlier runs wrote for --out. pairs: the file of the tasks. Raises UserError for a
    record whose prompt or response is not that of the task with the same id, and for a record with
    a line number that does not tell which response it is about.
    """
    of_id, changed, by_content = {task.id: task for task in tasks}, {}, {}
    records = list(records)
    for record in records:
        content, number = _content(record), LINE_NUMBER.fullmatch(record.id)
        if task := of_id.get(record.id):
            if content not in (None, task.content):
                changed[record.id] = record
        elif number and content:
            ids = by_content.setdefault(content, [])
            ids += [record.id] if record.id not in ids else []
        elif number and number[1] == Path(pairs).name:
            raise UserError(f"{_file_of(record, out)}: record {record.id!r}: expected an id made "
                            "from the content, got the line number of an older version, which does "
                            "not tell which response was meant; delete the line or choose another "
                            "--out")
    if changed:
        id, record = next(iter(changed.items()))
        raise UserError(f"{_file_of(record, out)}: record {id!r}: expected the prompt and response "
                        f"of {pairs}, got others (in {len(changed)} records); delete the lines "
                        "of these records to edit the new responses, or choose another --out")
    done = {record.id for record in records}
    unnamed = [task for task in tasks if task.is_unnamed and task.id not in done]
    old_ids = {task.id: by_content[task.content].pop(0) for task in unnamed
               if by_content.get(task.content)}
    return [replace(task, id=old_ids.get(task.id, task.id)) for task in tasks]


def _content(record: Edit | Skip | Draft) -> str | None:
    """Returns the hash of what was edited; None if an older version did not write it."""
    if isinstance(record, Edit):
        return content_of(record.prompt, record.input, record.context, record.original)
    return record.content


def _file_of(record: Edit | Skip | Draft, out: str | Path) -> Path:
    """Returns the file that has the record."""
    return {Edit: Path, Skip: skipped_path, Draft: drafts_path}[type(record)](Path(out))
