"""Checks decoded JSON against a dataclass: its annotations are the table of expected fields.

    @dataclass(frozen=True)
    class Pair:
        id: Text                           # required, a string that is not blank
        annotator: str | None = None       # optional; null counts as absent

    check(Pair, {"id": "a"}, "pairs.jsonl:12") -> Pair(id="a", annotator=None)

The supported types are str, Text, Id (a string that is not blank; an integer 7 is taken as "7"),
Label (a string; anything else counts as absent), int, float (finite), bool, list, dict[str, X],
tuple[X, ...] (a JSON list), Literal[1, 2] (one of these numbers or strings), X | None, and
dataclasses of these.
"""

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Container


class UserError(ValueError):
    """An error that the user can fix. One line: place, expected, got, what to do."""


Text = typing.Annotated[str, "not blank"]
Id = typing.Annotated[str, "not blank, or an integer"]
Label = typing.Annotated[str | None, "anything but a string counts as absent"]

_EXPECTED = {str: "a string", Text: "a string that is not blank", int: "an integer",
             float: "a number", Id: "a string that is not blank, or an integer",
             bool: "true or false", list: "a list"}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
show = _REPR.repr                          # a value in an error message: one line, never long


def check(kind, value, place: str, field: str = "", also: Container[str] = ()):
    """Returns `value`, decoded JSON, as the type `kind`. A dataclass is returned as its instance.

    place, field: the position of the value, for the error message. also: names of fields that are
    allowed and ignored, although the dataclass does not have them. Raises UserError when the value
    does not fit.
    """
    if dataclasses.is_dataclass(kind):
        return _check_record(kind, value, place, field, also)
    if kind == Label:
        return value if _is_a(str, value) else None
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):                      # `X | None`
        return None if value is None else check(inner[0], value, place, field)
    if origin is typing.Literal:
        if isinstance(value, bool) or value not in inner:               # in Python, True == 1
            refuse(place, field, f"one of {', '.join(map(str, inner))}", value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            refuse(place, field, "a list", value)
        return tuple(check(inner[0], item, place, f"{field}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            refuse(place, field, "an object", value)
        return {key: check(inner[1], item, place, f"{field}.{show(key)}")
                for key, item in value.items()}
    if kind == Id and _is_a(int, value):
        return str(value)
    if not _is_a(kind, value):
        refuse(place, field, _EXPECTED[kind], value)
    return value


def _is_a(kind, value) -> bool:
    if kind is int or kind is float:                                   # in Python, True is an int
        if isinstance(value, float):
            return kind is float and math.isfinite(value)
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is bool or kind is list:
        return isinstance(value, kind)
    if not isinstance(value, str) or (kind is not str and not value.strip()):
        return False
    try:
        return value.isascii() or bool(value.encode("utf-8"))
    except UnicodeEncodeError:                                         # half of a surrogate pair
        return False


def _check_record(record: type, value, place: str, field: str, also: Container[str]):
    if not isinstance(value, dict):
        refuse(place, field or "record", "an object", value)
    table, prefix = _field_table(record), field + "." if field else ""
    for name in value:
        if name not in table and name not in also:
            raise UserError(f"{place}: {prefix}{show(name)}: unknown field, expected one of "
                            f"{', '.join(table)}; rename or delete the field")
    checked = {}
    for name, (kind, required) in table.items():
        if required and name not in value:
            raise UserError(f"{place}: {prefix}{name}: expected this field, got only "
                            f"{show(sorted(value))}; add the field")
        if required or value.get(name) is not None:
            checked[name] = check(kind, value[name], place, prefix + name)
    return record(**checked)


def take(value, field: str, kind, place: str, inside: str = ""):
    """Returns the field of a decoded JSON object as the type `kind`. It must be there.

    inside: the name of the object in its record, with a dot at its end ("feedback.").
    """
    if not isinstance(value, dict):
        refuse(place, inside.rstrip(".") or "record", "an object", value)
    if field not in value:
        raise UserError(f"{place}: {inside}{field}: expected this field, got only "
                        f"{show(sorted(value))}; add the field")
    return check(kind, value[field], place, inside + field)


@functools.cache
def _field_table(record: type) -> dict[str, tuple[object, bool]]:
    """Returns {field name: (type, whether it is required)} of a dataclass."""
    hints = typing.get_type_hints(record, include_extras=True)
    return {field.name: (hints[field.name], field.default is dataclasses.MISSING)
            for field in dataclasses.fields(record)}


def refuse(place: str, field: str, expected: str, value) -> typing.NoReturn:
    """Raises the UserError for a value that is not what its field expects."""
    raise UserError(f"{place}: {field}: expected {expected}, got {show(value)}; "
                    "correct or delete the record")
