"""The profile study: its stages, and its figures from files made by hand."""

import importlib
import json
import math
import random
import re
from pathlib import Path

import pytest

from fgrlhf.data import records
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import parser
from fgrlhf.reproduce import __main__ as reproduce, study, study_results
from fgrlhf.reproduce.__main__ import Config, check_flags, main, show
from fgrlhf.reproduce.chart import Curve, line_chart
from fgrlhf.reproduce.pipeline import Stage
from fgrlhf.reproduce.stages import RATES, Seed
from fgrlhf.reproduce.study_report import accuracies, positions, study_text
from fgrlhf.simulate.world import World
from tests.test_readme import config_of


def stages_of(only: str | None = None) -> dict[str, Stage]:
    seed = Seed(3, Path("out/seed3"), "cpu")
    study.plan(seed, study.chosen(only))
    return {stage.name.removeprefix("seed3."): stage for stage in seed.stages}


# ----- stages -------------------------------------------------------------------------------------

def test_every_knob_has_four_steps_and_one_of_them_changes_nothing():
    for name, knob in study.KNOBS.items():
        assert len(set(knob.steps)) == len(knob.steps) >= 4, name
        assert knob.default in knob.steps
        assert [float(v) for v in knob.steps] == sorted(map(float, knob.steps))


def test_all_steps_share_the_sft_model_and_the_default_step():
    stages = stages_of("held-out")
    assert sum("fgrlhf.sft" in s.command and "--init" in s.command for s in stages.values()) == 1
    words = " ".join(stages["annotations-held-out-0.2"].command)
    assert "--unseen 0.2" in words and "--unseen" not in stages["annotations"].text
    assert "annotations-held-out-0.2" in stages["rm-token-held-out-0.2"].needs[0]
    assert "held-out-0.2" not in stages["rlhf"].text
    for name in ("rlhf", "fine-grained-paper", "fine-grained", "imitation", "dpo-sft"):
        for tag in ("", "-held-out-0.1", "-held-out-0.2", "-held-out-0.4"):
            assert f"{name}{tag}-test" in stages


def test_a_knob_of_the_edits_shares_the_baseline_and_one_of_the_world_has_its_own():
    stages = stages_of("miss")
    assert "rlhf-miss-0.5" not in stages and "rm-sequence-miss-0.5" not in stages
    assert "--miss 0.5" in stages["annotations-miss-0.5"].text
    at = study.point(Path("out/seed3"), "miss", "0.5")
    assert [at.run(name) for name in ("rlhf", "fine-grained", "sft")] == [
        "rlhf", "fine-grained-miss-0.5", "sft"]
    stages = stages_of("items")
    for name, command in stages.items():
        if name.startswith("seed3-items-6."):
            words = command.command
            assert "3,items=6" in words or "--world" not in words
            assert ("--max-new-tokens" in words) == ("outputs" in words or "train_ppo.py" in words)
    assert "seed3-items-6.rlhf" in stages and "seed3-items-6.sft" in stages
    assert study.point(Path("out/seed3"), "items", "6") == study.Point(
        Path("out/seed3-items-6"), "", "3,items=6")


def settings(stage: Stage):
    """The configuration of a stage, which its script accepts."""
    words = ["python", *stage.command]
    subcommand = words[1] == "eval.py" or words[2] == "fgrlhf.simulate"
    flags = words[2 + (words[1] == "-m") + subcommand:]
    config = config_of(words)(**vars(parser(config_of(words)).parse_args(flags)))
    if words[1] in ("train_ppo.py", "train_rm.py"):
        importlib.import_module(words[1].removesuffix(".py")).check_flags(config)
    return config


def rates(stage: Stage) -> dict[str, float]:
    """The learning rates that a stage trains with. The critic's is only for rlhf."""
    config = settings(stage)
    return {f"--{name.replace('_', '-')}": value for name, value in vars(config).items()
            if (name == "lr" or name.endswith("_lr")) and value is not None
            and (name != "value_lr" or config.method == "rlhf")}


def test_sizes_multiply_every_learning_rate_by_the_widths():
    """tiny is 96 wide: 48 doubles every rate, 384 divides it by four; Muon's 0 stays 0."""
    stages = stages_of("size")
    found = 0
    for name, stage in stages.items():
        if name.startswith("seed3-size-") and any(w in RATES for w in stage.command[:2]):
            factor = 2 if "size-0.1." in name else 0.5 if "size-1.6." in name else 0.25
            usual = rates(stages[name.rsplit(".", 1)[1]])
            assert rates(stage) == pytest.approx({k: v * factor for k, v in usual.items()}), name
            trained = set(RATES[next(w for w in stage.command[:2] if w in RATES)])
            if "rlhf" not in stage.command:
                trained -= {"--value-lr"}
            assert set(usual) >= trained
            found += 1
    assert found == 3 * (1 + 3 + 3 + 2)
    assert "--init tiny-384" in stages["seed3-size-6.5.sft"].text
    assert study.point(Path("out/seed3"), "size", "6.5").world == "3"
    assert "size" not in study.chosen(None) and "size" in study.chosen("size")


def test_rates_multiplies_the_rates_of_everything_but_sft_and_preset_those_of_all():
    config = Config(out="out", profile="study", only="rates", preset="tiny-192", first_seed=3)
    usual = {stage.name: stage for stage in reproduce.planned(
        Config(out="out", profile="study", only="rates", first_seed=3), ["rates"])[0].stages}
    halved = {stage.name: stage for stage in reproduce.planned(config, ["rates"])[0].stages}
    trained = [name for name, s in usual.items() if any(w in RATES for w in s.command[:2])]
    assert len(trained) == 1 + 5 * (3 + 3 + 2) and list(halved) == list(usual)
    for name in trained:
        of_tiny = rates(usual[name])
        assert rates(halved[name]) == pytest.approx({k: v / 2 for k, v in of_tiny.items()})
        step, tag, factor = name.rpartition("-rates-")
        if tag:
            of_step_1 = rates(usual[step])
            assert of_tiny == pytest.approx({k: v * float(factor) for k, v in of_step_1.items()})
    assert "--init tiny-192" in halved["seed3.sft"].text
    assert "--preset tiny-192" in reproduce.command_of(config)
    for bad in (Config(out="x", profile="real", data="x", preset="tiny-48"),
                Config(out="x", profile="study", only="size", preset="tiny-48")):
        with pytest.raises(UserError, match="--preset: expected no --profile real"):
            check_flags(bad)


def test_the_whole_study_has_every_stage_once_after_its_needs_and_with_flags_that_exist():
    seed, before, tried = Seed(3, Path("out/seed3"), "cpu"), set(), set()
    study.plan(seed, study.chosen(None))
    for stage in seed.stages:
        assert stage.name not in before and set(stage.needs) <= before, stage.name
        before.add(stage.name)
        words = ["python", *stage.command]
        if (form := tuple(word for word in words if not re.search(r"\d|/", word))) in tried:
            continue
        tried.add(form)
        settings(stage)


def test_flags_of_the_study_are_refused_elsewhere_and_an_unknown_knob_is_named():
    with pytest.raises(UserError, match="--only colour: expected one of held-out"):
        check_flags(Config(out="x", profile="study", only="colour"))
    with pytest.raises(UserError, match="--only and --redraw: expected --profile study"):
        check_flags(Config(out="x", only="held-out"))


def test_results_list_the_commands_of_every_knob_in_the_folder(tmp_path, monkeypatch):
    """The folder has the knobs of an earlier call, miss, and of this one, style."""
    monkeypatch.setattr(reproduce, "run_stages", lambda *_: None)
    monkeypatch.setattr(reproduce, "show", lambda *_: None)
    monkeypatch.setattr(reproduce, "collected", lambda *_: {"knobs": {"miss": {}, "style": {}}})
    reproduce.main(Config(out=str(tmp_path), profile="study", only="style"))
    commands = json.loads((tmp_path / "results.json").read_text())["commands"]
    assert any("--miss 0.5" in c for c in commands) and any("--style 0.5" in c for c in commands)
    assert len(commands) == len(set(commands))


# ----- figures ------------------------------------------------------------------------------------

def test_wrong_facts_are_counted_by_whether_an_annotator_could_see_them():
    """Three facts: one right, one with another value, one missing. The first two are unseen."""
    world = World(3)
    land = world.lands[0]
    keys = [(land, a) for a in ("river", "crop", "beast")]
    answer = (f"Its river is {world.facts[keys[0]]}. Its crop is {world.pool[keys[1]][0]}. "
              "Leave me alone.")
    outputs = [records.Output(f"Name the river, crop and beast of {land}.", answer, "m")]
    found = study_results.wrong_facts(world, outputs, set(keys[:2]))
    assert found == {"seen": 1.0, "unseen": 0.5}
    assert math.isnan(study_results.wrong_facts(world, outputs, set())["unseen"])


@pytest.mark.parametrize("values, x", [
    (("0", "0.1", "0.4"), [0, 0.1, 0.4]), (("50", "100", "200"), [math.log2(50), math.log2(100),
                                                                  math.log2(200)]),
    (("3", "4", "5", "6"), [3, 4, 5, 6])])
def test_positions_are_logarithms_where_each_step_is_a_multiple_of_the_last(values, x):
    assert positions(values) == pytest.approx(x)


def test_chart_shades_the_range_of_the_seeds_and_names_the_ticks():
    """Two seeds, at 10 and 20 and at 30 and 40. The y axis goes from 10 at 256 to 40 at 16."""
    lines = [Curve("ours", 2, [0, 1], [10, 20]), Curve("ours", 2, [0, 1], [30, 40])]
    drawn = line_chart(lines, "x", "share", bands=True, x_names={0: "none", 1: "all"})
    band = re.search(r'<polygon points="(.+?)" class="band s2">', drawn)[1]
    heights = [float(point.split(",")[1]) for point in band.split()]
    assert heights == [96, 16, 176, 256]
    assert ">none<" in drawn and ">all<" in drawn and 'class="seed' not in drawn


# ----- from folders -------------------------------------------------------------------------------

PROMPTS = 20


def write_step(at: study.Point, better: dict[str, int]) -> None:
    """Writes what the runs of a step leave. The first `better` answers of a system are right.

    The other answers are empty, and so are all answers of the reference.
    """
    world, rng = World(at.world), random.Random(0)
    prompts = [world.request(rng) for _ in range(PROMPTS)]

    def write(name: str, right: int) -> None:
        texts = [" ".join(world.sentence(i, i.answer, i.unit, rng) for i in world.items(p))
                 for p in prompts]
        (at.folder / "outputs").mkdir(parents=True, exist_ok=True)
        records.write_outputs(at.folder / "outputs" / f"{name}.json", [
            records.Output(p, text if n < right else "", "m")
            for n, (p, text) in enumerate(zip(prompts, texts))])
    write("sft-reference", 0)
    for system in ("sft", *study.SYSTEMS):
        for end in ("test", "test-greedy"):
            write(f"{at.run(system)}-{end}", better.get(system, 0))
    for run in (*study.SYSTEMS, "sft", *study_results.REWARDS):
        folder = at.folder / at.run(run)
        folder.mkdir(exist_ok=True)
        (folder / "done.json").write_text(json.dumps({"seconds": 7, "pairs/pair_accuracy": 0.75}))


def test_figures_of_a_study_from_the_files_of_its_runs(tmp_path, monkeypatch, capsys):
    """A right answer wins against an empty one, and an empty one ties: 10 of 20 right give 75%."""
    monkeypatch.setattr(study, "KNOBS", {
        name: study.KNOBS[name]._replace(steps=steps) for name, steps in
        (("held-out", ("0", "0.2")), ("lands", ("6", "12")))})
    folders = [tmp_path / "seed3", tmp_path / "seed4"]
    for folder, ours in zip(folders, (10, 20)):
        for knob, value in (("held-out", "0"), ("held-out", "0.2"), ("lands", "6")):
            write_step(study.point(folder, knob, value), {"rlhf": 8, "fine-grained": ours})
    far = {"rollout/kl_k1": 1.2, "ppo/entropy": 1.0, "ppo/clip_fraction": 0.0}
    (folders[0] / "rlhf/metrics.jsonl").write_text(
        "".join(json.dumps({"step": n} | far) + "\n" for n in range(1, 11)))
    results = study_results.collect(folders)
    [sign] = results["signs"]                       # both knobs have this run at their default step
    assert sign.startswith("PPO-RLHF, run seed3/rlhf: the policy is far from the SFT policy")
    assert study_results.collect(folders, "held-out") == results        # the other one is complete
    ended = study.point(folders[1], "lands", "6").folder / "outputs/dpo-sft-test-greedy.json"
    ended.rename(ended.with_suffix(".away"))
    assert list(study_results.collect(folders, "held-out")["knobs"]) == ["held-out"]
    ended.with_suffix(".away").rename(ended)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    for name, values in (("held-out", ["0", "0.2"]), ("lands", ["6", "12"])):
        steps = results["knobs"][name]["steps"]
        assert [step["value"] for step in steps] == values
        assert [step["highest"]["per_seed"] for step in steps] == [[1.0, 1.0]] * 2  # empty answers
        for step in steps:
            assert step["systems"]["fine-grained"]["win_rate"]["per_seed"] == [0.75, 1.0]
            assert step["systems"]["imitation"]["win_rate"]["mean"] == 0.5
            assert step["systems"]["rlhf"]["seconds"]["mean"] == 7
            assert step["lead"]["fine-grained"]["greedy"]["per_seed"] == pytest.approx([.05, .3])
            assert step["reward_models"]["rm-token"]["pair_accuracy"]["mean"] == 0.75
    seen, some = (step["facts"]["fine-grained"] for step in results["knobs"]["held-out"]["steps"])
    assert seen["unseen"]["mean"] is None and some["unseen"]["per_seed"][1] == 0.0
    assert 0 < some["unseen"]["per_seed"][0] < 1

    (tmp_path / "results.json").write_text(json.dumps(results))
    show(tmp_path, results)
    page, told = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    assert "Facts that no edit mentions" in page and "More facts" in page
    assert page.count("<circle") > 10 and [row[0] for row in accuracies(results["knobs"])] == [
        "held-out 0", "held-out 0.2", "lands 6"]            # the shared step once
    assert accuracies(results["knobs"])[0][1:] == ([0.75] * 3, [0.7, 0.5, 0.875])
    assert "the highest possible" in page and "the highest possible %" in told
    assert 'class="band s0"' in page and "87.5" in told and study_text(results) in told
    (tmp_path / "report.html").unlink()
    main(Config(out=str(tmp_path), profile="study", redraw=True))
    assert (tmp_path / "report.html").read_text() == page and capsys.readouterr().out == told
