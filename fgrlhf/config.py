"""One frozen dataclass a script becomes its command line, the resolved values its config.json.

    @dataclass(frozen=True)
    class Config:
        out: str = arg(help="folder for the results")              # no default: required
        lr: float = arg(6e-4, help="Adam's learning rate")
        kind: str = arg("token", choices=("token", "sequence"), help="...")

Flags are the field names with dashes; an unknown flag is an error; a bool is `--flag / --no-flag`.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import types
import typing


class UserError(ValueError):
    """Something the user can mend: one line with the place, what was expected and what to do."""


def arg(default=dataclasses.MISSING, *, help: str, choices: tuple | None = None,
        least: float | None = None):
    """A dataclass field with its help text; without a default the flag is required.

    least: the smallest number that makes sense; a smaller one is refused like a wrong type.
    """
    return dataclasses.field(default=default,
                             metadata={"help": help, "choices": choices, "least": least})


def at_least(kind: type, least: float | None):
    """An argparse type: a number of `kind` not below `least`, nor beyond what the machine holds."""
    def number(text: str):
        value = kind(text)
        if not (least is None or value >= least):                   # refuses NaN as well
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}, got {text}")
        if not abs(value) < 2 ** 63:
            raise argparse.ArgumentTypeError(f"expected a number below 2^63, got {text}")
        return value
    number.__name__ = kind.__name__                                # argparse names it in its errors
    return number


class OneLineParser(argparse.ArgumentParser):
    """Refuses in one line, as everything else here does; the flags are in --help."""

    def error(self, message: str):
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def parser(config: type, prog: str | None = None, description: str = "") -> argparse.ArgumentParser:
    """An argument parser with one flag for each field of the dataclass `config`."""
    result = OneLineParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    hints = typing.get_type_hints(config)
    for field in sorted(dataclasses.fields(config), key=lambda f: f.kw_only):    # inherited last
        required = field.default is dataclasses.MISSING
        text = field.metadata["help"]
        if not required and field.default is not None:
            text += f" (default: {field.default})"
        options = {"help": text.replace("%", "%%"), "required": required, "dest": field.name}
        if not required:
            options["default"] = field.default
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):                       # `int | None`
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            least = field.metadata["least"]
            options |= {"type": at_least(kind, least) if kind in (int, float) else kind,
                        "choices": field.metadata["choices"],
                        "metavar": None if field.metadata["choices"] else kind.__name__.upper()}
        result.add_argument("--" + field.name.replace("_", "-"), **options)
    return result


def parse(config: type, argv: list[str] | None = None, prog: str | None = None,
          description: str = ""):
    """argv -> a frozen instance of `config`; a bad flag or value ends the program with status 2."""
    return config(**vars(parser(config, prog, description).parse_args(argv)))


def to_json(config) -> str:
    """The resolved configuration as it is saved beside the results."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def resume_command() -> str:
    """The command that was typed, with --resume."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = ["-m", spec.name] if spec is not None else sys.argv[:1]
    return shlex.join(["python", *script, *sys.argv[1:],
                       *([] if "--resume" in sys.argv else ["--resume"])])


def run(main: typing.Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and status 2, a non-finite number 1."""
    try:
        main()
        sys.stdout.flush()                      # a reader that went away shows here at the latest
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:                     # what is buffered yet would be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; check path, "
              "permissions and free space", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
