"""One check for every record: a dataclass's annotations are its table of fields.

    @dataclass(frozen=True)
    class Pair:
        id: Text                           # required, a string that is not blank
        annotator: str | None = None       # optional; null counts as absent

    check(Pair, {"id": "a"}, "pairs.jsonl:12") -> Pair(id="a", annotator=None)

Understood are str, Text, int, float, dict[str, X], tuple[X, ...] (a JSON list), X | None and
dataclasses of these.
"""

import dataclasses
import functools
import reprlib
import types
import typing
from collections.abc import Container

from fgrlhf.config import UserError

Text = typing.Annotated[str, "not blank"]

_EXPECTED = {str: "a string", Text: "a string that is not blank", int: "an integer",
             float: "a number"}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
show = _REPR.repr                          # a value in an error message: one line, never long


def check(kind, value, place: str, field: str = "", also: Container[str] = ()):
    """`value`, decoded JSON, as the type `kind`; a dataclass comes back as its instance.

    `place` and `field` say where the value stands; `also` names fields beyond the dataclass's own
    that are allowed and ignored. Raises UserError naming place, field, what was expected and got.
    """
    if dataclasses.is_dataclass(kind):
        return _check_record(kind, value, place, field, also)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:                                      # `X | None`
        return None if value is None else check(inner[0], value, place, field)
    if origin is tuple:
        if not isinstance(value, list):
            refuse(place, field, "a list", value)
        return tuple(check(inner[0], item, place, f"{field}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            refuse(place, field, "an object", value)
        return {key: check(inner[1], item, place, f"{field}.{show(key)}")
                for key, item in value.items()}
    if not _is_a(kind, value):
        refuse(place, field, _EXPECTED[kind], value)
    return value


def _is_a(kind, value) -> bool:
    if kind is int or kind is float:                                   # to Python, True is an int
        numbers = (int, float) if kind is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    if not isinstance(value, str) or (kind is Text and not value.strip()):
        return False
    try:
        return value.isascii() or bool(value.encode("utf-8"))
    except UnicodeEncodeError:                                         # half of a surrogate pair
        return False


def _check_record(record: type, value, place: str, field: str, also: Container[str]):
    if not isinstance(value, dict):
        refuse(place, field or "record", "an object", value)
    table, prefix = field_table(record), field + "." if field else ""
    for name in value:
        if name not in table and name not in also:
            raise UserError(f"{place}: {prefix}{show(name)}: unknown field, expected one of "
                            f"{', '.join(table)}; rename or delete it")
    checked = {}
    for name, (kind, required) in table.items():
        if required and name not in value:
            raise UserError(f"{place}: {prefix}{name}: expected this field, got only "
                            f"{show(sorted(value))}; add it")
        if required or value.get(name) is not None:
            checked[name] = check(kind, value[name], place, prefix + name)
    return record(**checked)


@functools.cache
def field_table(record: type) -> dict[str, tuple[object, bool]]:
    """{field name: (type, required)} of a dataclass."""
    hints = typing.get_type_hints(record, include_extras=True)
    return {field.name: (hints[field.name], field.default is dataclasses.MISSING)
            for field in dataclasses.fields(record)}


def refuse(place: str, field: str, expected: str, value) -> typing.NoReturn:
    """Raise the UserError for a value that is not what its field expects."""
    raise UserError(f"{place}: {field}: expected {expected}, got {show(value)}; "
                    "mend or delete the record")
