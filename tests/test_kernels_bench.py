"""The benchmark of the kernels: every command of kernels/README.md runs, and what it prints."""

import json
import re

import pytest

from kernels import bench
from tests.processes import ROOT

README = (ROOT / "kernels/README.md").read_text()
COMMANDS = re.findall(r"^    python -m kernels\.bench(.*)$", README, re.MULTILINE)
QUICK = "--sizes 16x8x32 --repeats 1 --no-memory --only fused plain --json"


@pytest.mark.parametrize("flags", COMMANDS)
def test_main_runs_the_commands_of_the_readme(flags, tmp_path, monkeypatch, capsys):
    """At a small size, and without the rows that need a compiler or other libraries."""
    path = tmp_path / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench", *flags.split(), *QUICK.split(), str(path)])
    bench.main()
    tables, out = json.loads(path.read_text())["tables"], capsys.readouterr().out
    assert {table["work"] for table in tables} in (set(bench.MATMULS), {"ppo"}, {"ppo", "logp"})
    for table in tables:
        assert set(table["rows"]) == {"floor", "fused", "plain"}
        assert all(row["ratio"] > 0 for row in table["rows"].values())
        assert f"\n{table['work']}: N 16, D 8, V 32." in out


@pytest.mark.parametrize("flag, value, says", [
    ("--sizes", "a", "NxDxV"), ("--sizes", "1", "NxDxV"), ("--sizes", "0x8x32", "NxDxV"),
    ("--repeats", "0", "at least 1"), ("--threads", "-3", "at least 1"),
    ("--peak-of", "nope", "expected a row of ppo"), ("--device", "foo", "foo is not usable here"),
    ("--device", "meta", "meta is not usable here"), ("--work", "nope", "invalid choice")])
def test_a_flag_that_makes_no_sense_is_refused_in_one_line(flag, value, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", flag, value])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(f"error: argument {flag}: .*{says}.*; see .*\n", err)


def test_floor_runs_the_matmuls_of_the_work(monkeypatch):
    """2 N D V operations per matmul."""
    calls, mm = [], bench.torch.mm
    monkeypatch.setattr(bench.torch, "mm", lambda a, b, out: calls.append(
        2 * a.shape[0] * a.shape[1] * b.shape[1]) or mm(a, b, out=out))
    problem = bench.Problem(8, 4, 6, "cpu", bench.torch.float32)
    for count in set(bench.MATMULS.values()):
        calls.clear()
        problem.floor(count)()
        assert calls == [2 * 8 * 4 * 6] * count


def test_variants_import_other_libraries_only_when_their_rows_are_wanted(monkeypatch):
    monkeypatch.setattr(bench, "peers", lambda work: {"trl": asked.append(work)})
    asked: list[str] = []
    assert list(bench.variants("ppo", ["fused", "plain"])) == ["fused", "plain"] and not asked
    assert list(bench.variants("ppo", ["trl"])) == ["trl"] and asked == ["ppo"]
    assert list(bench.variants("ppo")) == ["fused", "plain", "plain compiled", "trl"]
