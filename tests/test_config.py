"""One dataclass, one command line: types, defaults, refusals, help."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import arg, parse, parser, run, to_json


@dataclass(frozen=True)
class Config:
    out: str = arg(help="folder")
    learning_rate: float = arg(6e-4, help="100% of it")
    kind: str = arg("token", choices=("token", "sequence"), help="which")
    limit: int | None = arg(None, help="at most")
    resume: bool = arg(False, help="go on")


def test_parse_gives_defaults_and_typed_values():
    assert parse(Config, argv=["--out", "a"]) == Config("a", 6e-4, "token", None, False)
    argv = "--out a --learning-rate 1e-2 --kind sequence --limit 3 --resume".split()
    assert parse(Config, argv=argv) == Config("a", 1e-2, "sequence", 3, True)
    assert parse(Config, argv=["--out", "a", "--resume", "--no-resume"]).resume is False


def test_parse_returns_a_frozen_instance():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(Config, argv=["--out", "a"]).limit = 3


@pytest.mark.parametrize("argv, text", [
    ([], "required: --out"), (["--out", "a", "--lr", "1"], "unrecognized arguments: --lr"),
    (["--out", "a", "--learn", "1"], "unrecognized arguments: --learn"),          # no abbreviations
    (["--out", "a", "--kind", "word"], "invalid choice: 'word'"),
    (["--out", "a", "--limit", "x"], "invalid int value"),
    (["--out", "a", "b"], "unrecognized arguments: b"), (["--out"], "expected one argument")])
def test_parse_refuses_with_exit_status_2(argv, text, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, argv=argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and text in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_parser_help_names_every_flag_its_text_and_its_default():
    text = parser(Config, "What it does.").format_help()
    for part in ("What it does.", "--out STR", "--learning-rate FLOAT", "100% of it",
                 "(default: 0.0006)",
                 "{token,sequence}", "--limit INT", "--resume, --no-resume"):
        assert part in text
    assert "default: None" not in text


def test_parser_lists_what_a_config_inherits_behind_its_own():
    @dataclass(frozen=True, kw_only=True)
    class Base:
        """What is shared"""
        depth: int = arg(1, help="of the base")

    @dataclass(frozen=True)
    class Derived(Base):
        out: str = arg(help="its own")

    text = parser(Derived).format_help()
    assert text.index("--out STR  ") < text.index("What is shared:") < text.index("--depth INT  ")
    assert parse(Derived, argv=["--out", "x", "--depth", "2"]) == Derived(out="x", depth=2)


def test_to_json_holds_every_resolved_value():
    config = parse(Config, argv=["--out", "a", "--limit", "3"])
    assert json.loads(to_json(config)) == {"out": "a", "learning_rate": 6e-4, "kind": "token",
                                           "limit": 3,
                                           "resume": False}


def test_run_turns_a_user_error_into_one_line_and_status_2(capsys):
    def main():
        raise UserError("a.jsonl:3: id: expected a string")
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a.jsonl:3: id: expected a string\n"


def test_run_lets_every_other_error_through():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("printing", ["[print('x' * 1000, flush=True) for _ in range(10000)]",
                                      "[print('x' * 1000) for _ in range(10000)]",
                                      "(sys.stdin.read(), print('x'))"])
def test_run_survives_a_reader_that_goes_away(printing, unbuffered):
    """`script | head`: no traceback, whether Python buffers its output or not."""
    code = f"import sys\nfrom fgrlhf.engine.config import run\nrun(lambda: {printing})"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONUNBUFFERED": unbuffered}) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.wait() == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"},
                                    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_run_prints_utf_8_in_every_locale(locale):
    code = ("from fgrlhf.engine.config import run\n"
            "run(lambda: print('\\u6f22', '\\U0001f642', '\\udcff', sep=''))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                          env=os.environ | locale)
    assert (done.returncode, done.stdout, done.stderr) == (0, "漢🙂?\n".encode(), b"")


def test_run_takes_a_stdout_that_has_no_encoding(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    run(lambda: print("🙂"))
    assert sys.stdout.getvalue() == "🙂\n"


@dataclass(frozen=True)
class Bounded:
    batch: int = arg(4, least=1, help="sequences a step")
    share: float = arg(0.5, least=0, help="a share")
    part: float = arg(0.5, least=0, most=1, help="a part of a whole")


@pytest.mark.parametrize("argv", [["--batch", "0"], ["--share", "-0.1"], ["--share", "nan"]])
def test_parse_refuses_a_number_below_the_least(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Bounded, argv=argv)
    assert stop.value.code == 2
    assert f"argument {argv[0]}: expected a number of at least" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["2", "-0.1", "1.0001", "nan", "inf"])
def test_parse_refuses_a_number_outside_a_range(value, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Bounded, argv=["--part", value])
    assert stop.value.code == 2
    assert (f"error: argument --part: expected a number from 0 to 1, got {value};"
            in capsys.readouterr().err)


@pytest.mark.parametrize("argv", [["--batch", "1" + "0" * 30], ["--share", "inf"]])
def test_parse_refuses_a_number_beyond_the_machine(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Bounded, argv=argv)
    assert stop.value.code == 2
    assert f"argument {argv[0]}: expected a number below 2^63" in capsys.readouterr().err


def test_run_turns_a_refusal_of_the_system_into_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(lambda: open(tmp_path / "absent" / "file"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == (f"error: {tmp_path}/absent/file: No such file or directory; "
                                       "check path, permissions and free space\n")


def test_run_says_interrupted_with_status_130(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_parse_takes_the_least_number_itself():
    assert parse(Bounded, argv=["--batch", "1", "--share", "0"]) == Bounded(1, 0.0)
    assert parse(Bounded, argv=["--part", "1"]).part == 1.0


def test_run_says_what_was_not_finite_with_status_1(capsys):
    def main():
        raise FloatingPointError("step 3: rewards: expected finite numbers")
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "stopped: step 3: rewards: expected finite numbers\n"
