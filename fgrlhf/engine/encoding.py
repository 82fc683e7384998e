"""encoding.json in a model folder: how the records of its training became ids.

A reward model has learnt to judge prompts and responses in one form. In another form its rewards
are numbers without a meaning, and nothing fails. The form is therefore kept with the model, and
whoever uses the model compares it with the flags it was given.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from fgrlhf.data.fields import UserError, show
from fgrlhf.data.files import read_object, write_atomic

FILE = "encoding.json"


class Encoding(NamedTuple):
    """The flags by which records became ids."""

    template: str                       # a known name, or the text of a template file
    prompt_tokens: int | None = None    # a longer prompt lost its beginning; None: none was cut
    normalise: bool = False             # runs of whitespace in edits became one blank
    hide: str = "nothing"               # a control: what the model was not shown (fgrlhf/encode.py)


def is_text(template: str) -> bool:
    """Tells whether a template is given by its text and not by a name (fgrlhf/templates.py)."""
    return "{prompt}" in template


def write_encoding(folder: str | Path, encoding: Encoding) -> None:
    """Writes encoding.json into a model folder. `hide` is in it only for a control."""
    values = encoding._asdict()
    if encoding.hide == "nothing":
        del values["hide"]
    write_atomic(Path(folder) / FILE, (json.dumps(values) + "\n").encode())


def read_encoding(folder: str | Path) -> Encoding | None:
    """Reads encoding.json; None when the folder has none, as models from elsewhere."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    found = {"hide": "nothing"} | read_object(file, "copy the folder again")
    kinds = {"template": str, "prompt_tokens": (int, type(None)), "normalise": bool, "hide": str}
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise UserError(f"{file}: {name}: expected a value as train_rm.py or fgrlhf.sft "
                            f"writes, got {show(found.get(name))}; copy the folder again")
    return Encoding(*(found[name] for name in kinds))


def check_encoding(folder: str | Path, **given) -> Encoding | None:
    """Returns the encoding of a model folder, and compares it with flags: name=value.

    Raises UserError when a flag is another than in the model's training. A reward model that does
    not say is used, and stderr says so. Other models that do not say come from elsewhere. Whoever
    gives no `hide` hides nothing, and a control is refused.
    """
    encoding = read_encoding(folder)
    if encoding is None:
        if (Path(folder) / "reward.json").is_file():
            print(f"{folder}: there is no {FILE}, so it is not known whether this reward model was "
                  f"trained with {' and '.join(map(_flag, given, given.values()))}",
                  file=sys.stderr)
        return None
    for name, value in ({"hide": "nothing"} | given).items():
        if (trained := getattr(encoding, name)) != value:
            flag = _flag(name, trained)
            if name == "template" and is_text(trained):
                flag = f"--template {folder}"           # read_template takes a folder
            raise UserError(f"{folder}: expected {flag}, with which this model was "
                            f"trained ({FILE}), got {_flag(name, value)}; give the same flags to "
                            "both, or train a model with these flags")
    return encoding


def _flag(name: str, value) -> str:
    if name == "template" and is_text(value):
        return "--template with the text of a file"
    flag = "--" + name.replace("_", "-")
    return f"no {flag}" if value in (None, False) else flag if value is True else f"{flag} {value}"
