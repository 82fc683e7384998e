"""python -m fgrlhf.compare: what differs, last figures, groups of seeds, curves, CSV, bad input."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from fgrlhf.compare.__main__ import Config, main
from fgrlhf.compare.page import curves_of
from fgrlhf.compare.runs import names_of, read_groups, read_run
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import Machinery, parse
from fgrlhf.engine.run import Run
from tests import processes
from tests.test_report import Reader


@dataclass(frozen=True, kw_only=True)
class Settings(Machinery):
    out: str
    reward: str = "runs/seed0/rm/reward"
    lr: float = 0.1
    world: int = 0


def write(folder: Path, lines: list[dict], finished: bool = True, **settings) -> str:
    """Writes an output folder as the training scripts do, with one line for each step."""
    run = Run(Settings(out=str(folder), **settings))
    for step, metrics in enumerate(lines, 1):
        run.log(step, metrics)
    run.finish({"held_out": 0.5 + run.config.seed / 8}) if finished else run.unlock()
    return str(folder)


def win_rates(*values: float) -> list[dict]:
    return [{"ppo/loss": -value, "rollout/episodes": 64.0 * step, "eval/win_rate": value}
            for step, value in enumerate(values, 1)]


def compare(capsys, *words: str) -> str:
    main(parse(Config, argv=list(map(str, words))))
    return capsys.readouterr().out


def table(text: str, title: str) -> dict[str, str]:
    """The rows of one table of the terminal, by name, with single blanks between the cells."""
    part = next(part for part in text.split("\n\n") if part.startswith(title))
    rows = [line.split() for line in part.splitlines()]
    return {row[0]: " ".join(row[1:]) for row in rows[2:]}


@pytest.fixture
def seeds(tmp_path) -> list[str]:
    """Two groups with the seeds 0 and 1. The win rates are .5 and .6, and .7 and .9."""
    words = []
    for name, rates, lr in (("A", (0.5, 0.6), 0.1), ("B", (0.7, 0.9), 0.2)):
        for seed, rate in enumerate(rates):
            folder = write(tmp_path / f"seed{seed}" / name, win_rates(0.4, rate), seed=seed, lr=lr,
                           world=seed, reward=f"runs/seed{seed}/{name}/reward")
            words.append(f"{name}={folder}")
    return words


# ----- single runs --------------------------------------------------------------------------------

def test_last_values_leave_nulls_out_and_the_best_win_rate_has_a_row(capsys, tmp_path):
    one = write(tmp_path / "one", win_rates(0.5, 0.75, 0.625) + [{"ppo/loss": -2.0,
                                                                  "eval/win_rate": math.nan}])
    two = write(tmp_path / "two", win_rates(0.25, 0.125), finished=False, lr=0.2)
    (tmp_path / "one" / "timing.jsonl").write_text('{"step": 4, "seconds": 12.5}\n')
    (tmp_path / "two" / "timing.jsonl").write_text('{"step": 2, "seconds": 3}\n')
    text = compare(capsys, one, two)
    assert '"eval/win_rate": null' in (tmp_path / "one" / "metrics.jsonl").read_text()
    assert table(text, "Last figures") == {
        "eval/win_rate": "0.6250 0.1250", "best": "eval/win_rate 0.7500 0.2500",
        "ppo/loss": "-2.000 -0.125", "rollout/episodes": "192 128", "seconds": "12.50 3.00"}
    runs = table(text, "Runs")
    assert runs["one"].startswith("train_ppo.py 0 4 1 of 1") and "0 2 0 of 1" in runs["two"]
    assert "The last steps of the runs differ (2, 4)" in text


def test_runs_with_different_rewards_are_said_to_be_so(capsys, tmp_path):
    lines = [{"rollout/reward": 1.0, "ppo/loss": -1.0, "rollout/episodes": 64.0}]
    a, b, c = (write(tmp_path / name, lines, reward=f"runs/{reward}/reward")
               for name, reward in (("a", "rm"), ("b", "rm"), ("c", "own")))
    assert "different rewards" not in compare(capsys, a, b)
    assert "their rollout/reward and ppo/loss cannot be compared." in " ".join(
        compare(capsys, a, c).split())


def test_settings_that_are_equal_are_not_listed(capsys, tmp_path):
    one = write(tmp_path / "one", win_rates(0.5), reward="runs/seed0/rm-a/reward")
    two = write(tmp_path / "two", win_rates(0.5), reward="runs/seed0/rm-b/reward", lora_rank=8)
    assert table(compare(capsys, one, two), "Settings that differ") == {
        "lora_rank": "0 8", "reward": "rm-a/reward rm-b/reward"}
    assert "Settings" not in compare(capsys, one)


def test_runs_of_different_scripts_are_said_to_be_so(capsys, tmp_path):
    one = write(tmp_path / "one", win_rates(0.5))
    two = write(tmp_path / "two", [{"sft/loss": 1.0}], lr=0.2)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    del config["world"]
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    text = compare(capsys, one, two, "--html", tmp_path / "page.html")
    assert "The runs are of different scripts" in text
    assert not Reader((tmp_path / "page.html").read_text()).all("svg")
    assert table(text, "Settings") == {"lr": "0.1 0.2"}              # not "world"
    assert list(table(text, "Last figures")) == ["seconds"]


def test_no_line_is_wider_than_the_terminal(capsys, tmp_path):
    folders = [write(tmp_path / f"a-folder-with-a-rather-long-name-{n}", win_rates(0.5),
                     reward=f"runs/{'x' * 30}/{n}/{'y' * 60}") for n in range(4)]
    text = compare(capsys, *folders)
    assert max(map(len, text.splitlines())) <= 104
    assert text.count("\nLast figures ") == 2                       # in two parts


# ----- groups -------------------------------------------------------------------------------------

def test_a_group_is_its_mean_with_an_interval_and_paired_differences(capsys, seeds):
    """Of two values the half interval is t(1) |a - b| / 2, where t(1) = 12.706."""
    text = compare(capsys, *seeds[:2], *reversed(seeds[2:]))
    assert table(text, "Last figures")["eval/win_rate"] == (
        "0.5500 [-0.0853, 1.1853] 0.8000 [-0.4706, 2.0706]")
    assert table(text, "Last figures")["held_out"] == (
        "0.5625 [-0.2316, 1.3566] 0.5625 [-0.2316, 1.3566]")
    assert table(text, "Difference from A") == table(text, "Difference from A") | {
        "eval/win_rate": "+0.2500 [-0.3853, +0.8853]", "rollout/episodes": "+0", "held_out": "+0"}
    assert table(text, "Runs")["A"].startswith("train_ppo.py 0, 1 2 2 of 2")


def test_in_a_group_the_seed_in_a_setting_is_no_difference(capsys, seeds):
    text = compare(capsys, *seeds)
    assert table(text, "Settings that differ") == {"reward": "A/reward B/reward", "lr": "0.1 0.2"}
    assert "differ in more than their seed" not in text


def test_what_else_differs_in_a_group_is_said(capsys, tmp_path, seeds):
    other = write(tmp_path / "other", win_rates(0.5), seed=2, lr=0.3, world=2,
                  reward="runs/seed2/A/reward")
    text = compare(capsys, *seeds, f"A={other}")
    assert "The runs of A differ in more than their seed: lr." in text
    assert table(text, "Settings that differ")["lr"] == "0.1 | 0.3 0.2"
    assert "No differences are shown for B: expected the seeds of A (0 to 2)." in text
    assert "Difference from" not in text


def test_a_number_that_equals_the_seed_by_chance_is_a_difference(capsys, tmp_path):
    words = [f"A={write(tmp_path / str(seed), win_rates(0.5), seed=seed, lora_rank=seed)}"
             for seed in (0, 1)]
    assert "The runs of A differ in more than their seed: lora_rank." in compare(capsys, *words)


def test_runs_without_a_name_are_named_by_the_end_of_their_paths(tmp_path, seeds):
    folders = [word.partition("=")[2] for word in seeds]
    names = lambda *words: [group.name for group in read_groups(words)]
    assert names(folders[0], folders[2]) == ["A", "B"]
    assert names(*folders[:3]) == ["seed0/A", "seed1/A", "seed0/B"]
    assert names("A=" + folders[1], folders[0]) == ["A", "seed0/A"]
    lr = write(tmp_path / "lr=0.1", win_rates(0.5))                 # a folder with "=" in its name
    assert names(lr, f"ours={folders[0]}") == ["lr=0.1", "ours"]


# ----- files --------------------------------------------------------------------------------------

def test_csv_has_every_number_in_long_form(capsys, tmp_path):
    one = write(tmp_path / "one", [{"sft/loss": 1.5}, {"sft/loss": math.nan}], seed=3)
    (tmp_path / "one" / "timing.jsonl").write_text('{"step": 1, "seconds": 2.5}\n')
    said = compare(capsys, f"a,b={one}", "--csv", tmp_path / "out.csv",
                   "--html", tmp_path / "a.html")
    assert said.endswith(f"\n\n{tmp_path}/a.html, {tmp_path}/out.csv\n")
    assert (tmp_path / "out.csv").read_text() == (
        'run,seed,step,metric,value\n"a,b",3,1,sft/loss,1.5\n"a,b",3,1,seconds,2.5\n')


def test_page_has_the_tables_and_one_chart_for_each_shared_metric(capsys, tmp_path, seeds):
    compare(capsys, *seeds, "--html", tmp_path / "page.html")
    reader = Reader((tmp_path / "page.html").read_text())
    spoken = [svg["aria-label"] for svg in reader.all("svg", role="img")
              if svg["class"] == "chart wide"]
    assert spoken == ["eval/win_rate, over episodes: A ends at 0.55; B ends at 0.8.",
                      "ppo/loss, over episodes: A ends at -0.55; B ends at -0.8."]
    assert len(reader.all("polyline", **{"class": "seed s1"})) == 2 * 2 * 2     # two forms
    for shown in ("0.8000", "[\N{MINUS SIGN}0.4706, 2.0706]", "A/reward"):
        assert shown in reader.text
    assert not reader.all("script") and not reader.all("link")


def test_curves_of_a_group_have_the_same_steps_up_to_the_shortest(tmp_path):
    line = lambda value: {"sft/loss": value}
    one = write(tmp_path / "one", [line(1.0), line(math.nan), line(3.0)], seed=0)
    two = write(tmp_path / "two", [line(v) for v in (1.0, 2.0, 4.0, 5.0)], seed=1)
    curves = curves_of(read_groups([f"x={one}", f"x={two}"]), "sft/loss", "steps")
    assert [(curve.x, curve.y) for curve in curves] == [([1, 3], [1, 3]), ([1, 3, 4], [1, 4, 5])]


def test_long_curves_are_means_of_blocks(tmp_path):
    one = write(tmp_path / "one", [{"sft/loss": float(n)} for n in range(601)])
    curve, = curves_of(read_groups([one]), "sft/loss", "steps")
    assert curve.x[:2] == [2, 5] and curve.y[:2] == [1, 4]           # three steps for each point
    assert len(curve.x) == 201 and curve.y[-1] == 600


LONG = "a-folder-of-42-characters-with-many-words-"


@pytest.mark.parametrize("folders, taken, names", [
    (["/r/a/rlhf", "/r/b/rlhf"], [], ["a/rlhf", "b/rlhf"]),
    (["/r/a/rlhf"], ["rlhf"], ["a/rlhf"]),
    ([f"/r/a/{LONG}/x/rlhf", f"/r/b/{LONG}/x/rlhf"], [], ["a/.../rlhf", "b/.../rlhf"]),
    ([f"/r/a/{LONG}/x/x", f"/r/b/{LONG}/x/x", f"/r/b/{LONG}/y/y"], [],
     ["a/.../x/x", "b/.../x/x", "b/.../y/y"]),
    ([f"/a/{LONG}/ppo", f"/r/a/{LONG}/ppo"], [], [".../ppo", "r/.../ppo"]),
    (["/a/ppo", "/b/a/ppo"], [], ["a/ppo", "b/a/ppo"]),
    ([f"/r/a/{LONG}", f"/r/b/{LONG}"], [], ["a/a-fol...ords-", "b/a-fol...ords-"]),
    ([f"/r/1/{LONG}", f"/r/1/other{LONG}"], [],
     ["a-folder-of-42-characters-with-m...ords-", "othera-folder-of-42-characters-w...ords-"]),
    (["/r/a\nb", "/r/c"], [], ["run 1", "run 2"])])
def test_runs_of_the_same_name_are_told_apart_by_the_folders_above(folders, taken, names):
    assert names_of(folders, set(taken)) == names


# ----- bad input ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, pattern", [
    ("metrics.jsonl", '{"step": 1, "a": 1}\n{"step": 2, "a"\n', "metrics.jsonl:2: .*broken JSON"),
    ("metrics.jsonl", '{"step": 1, "a": "x"}\n', "metrics.jsonl:1: a: expected a number, got 'x'"),
    ("metrics.jsonl", '{"a": 1}\n', "metrics.jsonl:1: step: expected this field"),
    ("metrics.jsonl", '[3]\n', "metrics.jsonl: record 1: record: expected an object, got 3"),
    ("metrics.jsonl", '{"step": 2}\n{"step": 2}\n', "metrics.jsonl:2: step: expected more than 2"),
    ("metrics.jsonl", "", "metrics.jsonl: expected a line of metrics for each step, got none"),
    ("metrics.jsonl", None, "expected a run with metrics, got no metrics.jsonl"),
    ("timing.jsonl", '{"step": 1, "seconds": 1}\nx\n', "timing.jsonl:2: "),
    ("config.json", None, "expected the --out folder of a training run, got a folder without"),
    ("config.json", '{"lr": 1}', "config.json: seed: expected this field"),
    ("done.json", "{", "done.json: expected one JSON object")])
def test_damage_is_refused_with_its_place(tmp_path, name, content, pattern):
    write(tmp_path / "run", win_rates(0.5))
    path = tmp_path / "run" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=pattern) as refusal:
        read_run(str(tmp_path / "run"))
    assert "\n" not in str(refusal.value)


def test_a_last_line_that_was_cut_off_is_left_out_of_an_unfinished_run_only(tmp_path):
    for name, finished in (("killed", False), ("done", True)):
        write(tmp_path / name, win_rates(0.5, 0.25), finished)
        with open(tmp_path / name / "metrics.jsonl", "a") as file:
            file.write('{"step": 3, "ppo/l')
    assert read_run(str(tmp_path / "killed")).metrics["eval/win_rate"] == {1: 0.5, 2: 0.25}
    with pytest.raises(UserError, match="metrics.jsonl:3"):
        read_run(str(tmp_path / "done"))


@pytest.mark.parametrize("words, pattern", [
    (["{0}", "{0}/"], "expected each run once, got the same folder as"),
    (["nowhere"], "nowhere: expected the --out folder of a training run, got nothing"),
    (["a={0}", "a={1}"], "a: expected runs of different seeds, got seed 0 in .*one and in .*two"),
    (["={0}"], "expected NAME=DIR"), ([f"{'n' * 41}={{0}}"], "expected NAME=DIR with a NAME of at"),
    (["{0}", "--csv", "{0}/metrics.jsonl"], "--csv .*: expected a file of its own"),
    (["{0}", "{1}", "--csv", "{1}/reward/reward.json"], "--csv .*: expected a file of its own, got "
                                                        "a path inside the run .*two;"),
    (["{0}", "--csv", "x", "--html", "x"], "--csv x: expected a file of its own")])
def test_bad_words_are_refused(tmp_path, words, pattern):
    one, two = (write(tmp_path / name, win_rates(0.5)) for name in ("one", "two"))
    with pytest.raises(UserError, match=pattern):
        main(parse(Config, argv=[word.format(one, two) for word in words]))


def test_a_page_and_a_table_are_written_over_those_of_this_command_only(tmp_path):
    one, html, csv = write(tmp_path / "one", win_rates(0.5)), tmp_path / "h", tmp_path / "c"
    for _ in range(2):
        main(parse(Config, argv=[one, "--html", str(html), "--csv", str(csv)]))
    for words, said in ((("--html", str(csv)), "an HTML page"), (("--csv", str(html)), "a table")):
        with pytest.raises(UserError, match=f"{words[1]}: expected a new file or {said} .*; choose "
                                            "another path or move it"):
            main(parse(Config, argv=[one, *words]))
    assert csv.read_text().startswith("run,seed") and html.read_text().startswith("<!doctype")


def test_a_table_into_a_pipe_or_into_stdout_is_refused_by_the_name_that_was_given(tmp_path):
    """stdout has the tables for people, so a reader of the CSV could not tell the two apart."""
    one = write(tmp_path / "one", win_rates(0.5))
    reader, writer = os.pipe()
    with pytest.raises(UserError, match=f"^--csv /dev/fd/{writer}: expected .* got a pipe or a "
                                        "device; choose the path of a file"):
        main(parse(Config, argv=[one, "--csv", f"/dev/fd/{writer}"]))
    os.close(reader), os.close(writer)
    done = processes.run(tmp_path, "fgrlhf.compare", one, "--csv", "/dev/stdout")
    assert done.status == 2 and done.out == ""
    assert done.err == ("error: --csv /dev/stdout: expected a file of its own, got the file to "
                        "which stdout goes; choose another path\n")


def test_the_command_ends_with_status_2_when_a_file_cannot_be_written(tmp_path):
    one = write(tmp_path / "one", win_rates(0.5))
    (tmp_path / "file").write_text("")
    for words in ((one, "--html", tmp_path / "file" / "x.html"), (one, "--csv", tmp_path / "one"),
                  ()):
        done = processes.run(tmp_path, "fgrlhf.compare", *words)
        assert done.status == 2 and done.out == "" and done.err.count("\n") == 1
        assert done.err.startswith("error: ")
