"""The profile study: its stages, its figures from files made by hand, and a small whole run."""

import json
import math
import random
from pathlib import Path

import pytest

from fgrlhf.data import records
from fgrlhf.data.fields import UserError
from fgrlhf.reproduce import study, study_results
from fgrlhf.reproduce.__main__ import Config, check_flags
from fgrlhf.reproduce.stages import Seed
from fgrlhf.reproduce.study_report import study_text
from fgrlhf.simulate.world import World
from tests import processes
from tests.test_reproduce_killed import LESS

LIMITED = LESS | {"outputs": ("--max-new-tokens", "8", "--limit", "12")}


def stages_of(only: str | None = None) -> dict[str, study.Seed]:
    seed = Seed(3, Path("out/seed3"), "cpu")
    study.plan(seed, only)
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


def test_flags_of_the_study_are_refused_elsewhere_and_an_unknown_knob_is_named():
    with pytest.raises(UserError, match="--only colour: expected one of held-out"):
        check_flags(Config(out="x", profile="study", only="colour"))
    with pytest.raises(UserError, match="--only and --redraw: expected --profile study"):
        check_flags(Config(out="x", only="held-out"))


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


# ----- a whole run --------------------------------------------------------------------------------

def small_study(command: list[str]) -> None:
    """Runs in place of `fgrlhf.reproduce`, with small stages and two steps of a knob."""
    from fgrlhf.engine.config import parse, run
    from fgrlhf.reproduce import __main__ as reproduce, pipeline
    pipeline.subprocess.Popen = processes.Stage
    study.KNOBS = {"held-out": study.KNOBS["held-out"]._replace(steps=("0", "0.1"))}
    init = pipeline.Stage.__init__

    def smaller(self, name, command, needs=()):
        command = tuple(part for part in command if part != "--skip-ties")
        for word, flags in LIMITED.items():
            if word in command:
                command += flags
        if "world" in command:
            command += ("--dev", "12", "--test", "12")
        if "annotate" in command and ".held-out" not in name:
            command += ("--limit", "4")
        init(self, name, command, needs)
    pipeline.Stage.__init__ = smaller
    run(lambda: reproduce.main(parse(reproduce.Config, argv=command[1:])))
    raise SystemExit(0)


def test_a_small_study_has_every_figure_and_redraws_its_report(tmp_path):
    out = tmp_path / "out"
    command = ("fgrlhf.reproduce", "--profile", "study", "--only", "held-out", "--seeds", 2,
               "--out", out, "--workers", 2)
    process, stem = processes.start(tmp_path, *command, instead=small_study)
    process.join(280)
    assert process.exitcode == 0, Path(f"{stem}.err").read_text()
    results = json.loads((out / "results.json").read_text())
    knob = results["knobs"]["held-out"]
    assert [step["value"] for step in knob["steps"]] == ["0", "0.1"]
    for step in knob["steps"]:
        assert set(step["systems"]) == {"sft", *study.SYSTEMS}
        for system in study.SYSTEMS[1:]:
            rates = [step["systems"][s]["win_rate"]["per_seed"] for s in (system, "rlhf")]
            assert step["lead"][system]["sampled"]["per_seed"] == pytest.approx(
                [a - b for a, b in zip(*rates)])
    assert knob["steps"][0]["facts"]["sft"]["unseen"]["mean"] is None
    report = out / "report.html"
    page = report.read_text()
    assert "Facts that no edit mentions" in page and 'class="band s0"' in page
    report.unlink()
    done = processes.run(tmp_path, *command[:-2], "--redraw")
    assert done.status == 0 and report.read_text() == page
    assert study_text(results) in done.out
