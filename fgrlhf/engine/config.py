"""One frozen dataclass per script: its fields become the command line and config.json.

    @dataclass(frozen=True)
    class Config(Machinery):
        out: str = arg(help="folder for the results")              # no default: required
        lr: float = arg(6e-4, help="Adam's learning rate")
        kind: str = arg("token", choices=("token", "sequence"), help="...")

    if __name__ == "__main__":
        run(lambda: train(parse(Config, __doc__)))

Flags are the names of the fields, with dashes. A bool becomes `--flag / --no-flag`. A field of the
type tuple[str, ...] takes the words that follow no flag, at least one. An unknown flag is an error.
Inherited fields come last in --help, in a group that has the docstring of the base class as its
title.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Sequence

from fgrlhf.data.fields import UserError


def arg(default=dataclasses.MISSING, *, help: str, choices: tuple | None = None,
        least: float | None = None, most: float | None = None,
        read: Callable[[str], str] | None = None):
    """Returns a dataclass field with its help text. Without a default the flag is required.

    least: the smallest number that makes sense. A smaller number is refused like a wrong type.
    most: the largest number, for a flag that has `least` too, such as a share.
    read: turns the text that was typed into the value, or raises UserError.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices,
                                                        "least": least, "most": most,
                                                        "read": read})


DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """Device and precision"""

    device: str = arg("auto", help="auto, cpu, cuda, ...; auto is cuda if there is one")
    dtype: str = arg("float32", choices=DTYPES, help="of weights and activations; bfloat16 trains "
                                                     "with float32 master weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machinery(Computation):
    """The machinery, the same in every training script"""

    seed: int = arg(0, help="seed of every random draw")
    lora_rank: int = arg(0, least=0, help="train adapters of this rank over frozen weights; 0 "
                         "trains all weights")
    checkpoint_activations: bool = arg(False, help="keep one activation per block and compute the "
                                       "others again in the backward pass: less memory, more time")
    save_every: int = arg(200, least=1, help="steps between training states for --resume")
    keep: int = arg(2, least=1, help="number of training states to keep")
    resume: bool = arg(False, help="continue the unfinished run in --out")


def within(kind: type, least: float | None, most: float | None = None):
    """Returns an argparse type: a number of `kind` from `least` to `most`, and below 2^63."""
    def number(text: str):
        value = kind(text)
        if most is not None and not least <= value <= most:         # refuses NaN as well
            raise argparse.ArgumentTypeError(f"expected a number from {least} to {most}, got "
                                             f"{text}")
        if not (least is None or value >= least):                   # refuses NaN as well
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}, got {text}")
        if not abs(value) < 2 ** 63:
            raise argparse.ArgumentTypeError(f"expected a number below 2^63, got {text}")
        return value
    number.__name__ = kind.__name__                                # argparse names it in its errors
    return number


def path_or_name(text: str) -> str:
    """An argparse type: any text but the empty one, which a shell makes of an unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path or a name, got an empty text")
    return text


def reading(read: Callable[[str], str]) -> Callable[[str], str]:
    """Returns an argparse type: `read`, whose UserError is the message."""
    def value(text: str) -> str:
        try:
            return read(path_or_name(text))
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return value


class OneLineParser(argparse.ArgumentParser):
    """A parser that refuses in one line. The flags are in --help."""

    def error(self, message: str):
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def program() -> str:
    """The command that started this program, as one types it, without its arguments."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return shlex.join(["python", sys.argv[0]])


def parser(config: type, description: str = "", prog: str | None = None) -> argparse.ArgumentParser:
    """Builds an argument parser with one flag for each field of the dataclass `config`."""
    result = OneLineParser(
        prog=prog or program(), description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(config)
    for owner, fields in _by_owner(config).items():
        group = result if owner is config else result.add_argument_group(owner.__doc__)
        for field in fields:
            _add_flag(group, field, hints[field.name])
    return result


def _by_owner(config: type) -> dict[type, list[dataclasses.Field]]:
    """The fields by the class they come from: the script's own first, then those of each base."""
    owners: dict[type, list[dataclasses.Field]] = {config: []}
    for field in dataclasses.fields(config):
        bases = [base for base in config.__bases__ if dataclasses.is_dataclass(base)
                 and field.name in {inherited.name for inherited in dataclasses.fields(base)}]
        owners.setdefault(bases[0] if bases else config, []).append(field)
    return owners


def _add_flag(group, field: dataclasses.Field, kind: type) -> None:
    required = field.default is dataclasses.MISSING
    text = field.metadata["help"]
    if not required and field.default is not None:
        text += f" (default: {field.default})"
    options = {"help": text.replace("%", "%%"), "required": required, "dest": field.name}
    if not required:
        options["default"] = field.default
    if isinstance(kind, types.UnionType):                           # `int | None`
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        group.add_argument(field.name, nargs="+", type=path_or_name, help=options["help"])
        return
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        least, most = field.metadata["least"], field.metadata["most"]
        choices = field.metadata["choices"]
        read = within(kind, least, most) if kind in (int, float) else path_or_name
        if field.metadata["read"]:
            read = reading(field.metadata["read"])
        options |= {"type": str if field.default == "" else read, "choices": choices,
                    "metavar": None if choices else kind.__name__.upper()}
    group.add_argument("--" + field.name.replace("_", "-"), **options)


def parse(config: type, description: str = "", argv: list[str] | None = None,
          prog: str | None = None):
    """Turns argv into an instance of `config`. A bad flag ends the program with status 2.

    Raises UserError when stdout is closed (`>&-`) and the command prints its result, which is so
    for every command without --out.
    """
    parsed = config(**vars(parser(config, description, prog).parse_args(argv)))
    if sys.__stdout__ is None and not hasattr(parsed, "out"):
        raise UserError("stdout: expected a place for the result, but it is closed; redirect it to "
                        "a file, or to /dev/null")
    return parsed


def refuse_unused(config, chooser: str, used: dict[str, Sequence[str]]) -> None:
    """Raises UserError for a flag that what the user chose does not use.

    chooser: the flag of the choice, such as method or judge. used: choice -> the flags that it
    uses, of those that not every choice uses. A flag with its default value is not noticed.
    """
    choice = getattr(config, chooser)
    for name in dict.fromkeys(name for names in used.values() for name in names):
        if name not in used[choice] and getattr(config, name) != getattr(type(config), name):
            users = " or ".join(other for other, names in used.items() if name in names)
            raise UserError(f"--{name.replace('_', '-')}: expected --{chooser} {users}, got "
                            f"--{chooser} {choice}, which does not use it; leave it out")


def dispatch(commands: dict[str, tuple[type, Callable]], description: str):
    """Runs the command that the first argument names: {name: (its Config, its function)}."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(description)
        return
    if name not in commands:
        raise UserError(f"expected one of {', '.join(commands)}, got {name!r}; "
                        f"see {program()} --help")
    config, action = commands[name]
    action(parse(config, description, sys.argv[2:], f"{program()} {name}"))


def to_json(config) -> str:
    """The resolved configuration, as it is saved with the results."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def resume_command() -> str:
    """The command that was typed, with --resume."""
    resume = [] if "--resume" in sys.argv else ["--resume"]
    return " ".join([program(), shlex.join([*sys.argv[1:], *resume])])


# ----- the end of a program -----------------------------------------------------------------------

MEMORY = re.compile("can't allocate memory|out of memory|bad_alloc|ALLOC_FAILED|unable to mmap",
                    re.IGNORECASE)


def run(main: Callable[[], None]) -> None:
    """Calls `main`, and turns what can go wrong outside the program into one line on stderr.

    The exit status is 2 for a UserError, a refusal of the system and too little memory, 1 for a
    number that is not finite, 130 after Ctrl-C, and 141 when the reader of stdout has gone away.
    Messages are lost when stderr is closed or its reader has gone away; the program goes on.
    stdout becomes UTF-8 in every locale; a lone surrogate, which UTF-8 cannot hold, becomes "?".
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:          # closed: the next file would become fd 0, 1 or 2
            setattr(sys, name, open(os.devnull, mode))
    if hasattr(sys.stdout, "reconfigure"):      # a caller may have put another stream there
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    with contextlib.redirect_stderr(_Messages(sys.stderr)):
        try:
            main()
            sys.stdout.flush()                  # a reader that has gone away shows here
        except UserError as error:
            _end(2, f"error: {error}")
        except FloatingPointError as error:
            _end(1, f"stopped: {error}")
        except BrokenPipeError:
            _end(141)
        except OSError as error:
            _end(2, f"error: {error.filename or 'stdout, or a file'}: {error.strerror or error}; "
                    "check path, permissions and free space")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
            _end(2, f"error: out of memory{f', {wanted[1]} more were wanted' if wanted else ''}; "
                    "lower --microbatch, --decode-batch or --batch, or take a smaller model "
                    "(python -m fgrlhf.plan computes the memory of a PPO run)")
        except KeyboardInterrupt:
            _end(130, "interrupted")
        finally:
            _flush(sys.stdout)                  # otherwise Python flushes again at exit, and fails


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error of Python, of the CPU's allocator or of CUDA means: no memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and MEMORY.search(str(error)) is not None)


def _end(status: int, message: str = "") -> typing.NoReturn:
    if message:
        print(message, file=sys.stderr)
    raise SystemExit(status) from None


def _flush(stream: typing.TextIO) -> None:
    """Writes what a stream holds back. From a failure on, what is written to it is lost."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Messages:
    """A stderr that outlives its reader (`2>&1 | head`) and a full disk.

    Progress and messages go there, never results. A run of hours must not end with them.
    """

    def __init__(self, stream: typing.TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            _flush(self.stream)
            return len(text)

    def flush(self) -> None:
        _flush(self.stream)
