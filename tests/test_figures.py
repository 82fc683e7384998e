"""The files of figures.py, and the conclusions of a knob, from results made by hand."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fgrlhf.data.fields import UserError
from fgrlhf.reproduce import figures
from fgrlhf.reproduce.__main__ import Config, main
from fgrlhf.reproduce.names import SYSTEMS as NAMES
from fgrlhf.reproduce.study_conclusions import conclusions
from fgrlhf.reproduce.study_report import knob_section, study_text

SVG = "{http://www.w3.org/2000/svg}"


def rate(*per_seed: float) -> dict:
    return {"mean": sum(per_seed) / len(per_seed), "interval": None, "per_seed": list(per_seed)}


def results_of(rates: dict[str, list[tuple[float, ...]]], steps=("0", "0.2"), **more) -> dict:
    """The results of a study with the knob held-out. rates: {system: its seeds at each step}."""
    knob = {"title": "Facts & sums", "axis": "share", "default": "0", "steps": []}
    for n, value in enumerate(steps):
        leads = {system: rate(*(a - b for a, b in zip(seeds[n], rates["rlhf"][n])))
                 for system, seeds in rates.items() if system not in ("sft", "rlhf")}
        greedy = {system: rate(.3, .3) if system == "fine-grained" else rate(.1, .1)
                  for system in leads}
        lead = {system: {"sampled": leads[system], "greedy": greedy[system]} for system in leads}
        knob["steps"].append({
            "value": value, "lead": lead, "systems": {
                system: {"win_rate": rate(*seeds[n]), "win_rate_greedy": rate(.95, .95),
                         "seconds": rate(7.0)}
                for system, seeds in rates.items()},
            "reward_models": {model: {"pair_accuracy": rate(0.5 + 0.1 * n)} for model in
                              ("rm-sequence", "rm-paper", "rm-token")}} | {
            name: found[n] for name, found in more.items()})
    return {"profile": "study", "seeds": [3, 4], "labels": {s: NAMES[s][0] for s in rates},
            "knobs": {"held-out": knob}}


FACTS = [{system: {"seen": rate(0.25, 0.35), "unseen": unseen}
          for system in ("sft", "fine-grained", "imitation")} for unseen in
         ({"mean": None, "interval": None, "per_seed": [None, None]}, rate(0.5, 0.5))]
RATES = {"sft": [(.5, .5)] * 2, "rlhf": [(.6, .7)] * 2, "fine-grained-paper": [(.6, .8)] * 2,
         "fine-grained": [(.7, .9), (.75, 1.0)], "imitation": [(.8, .8), (.6, .6)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    (out / "results.json").write_text(json.dumps(results_of(RATES, facts=FACTS)))
    main(Config(out=str(out), profile="study", redraw=True))
    return out


def test_every_chart_of_a_study_is_a_file_that_is_an_svg_of_its_own(folder):
    files = sorted((folder / "figures").iterdir())
    assert [file.name for file in files] == [
        "accuracy.svg", "held-out-facts.svg", "held-out-greedy.svg", "held-out-lead.svg",
        "held-out-rates.svg"]
    for file in files:
        root = ElementTree.parse(file).getroot()
        assert root.tag == f"{SVG}svg" and root.get("role") == "img"
        names = {element.text for element in root.iter(f"{SVG}text")}
        assert names >= {root.find(f"{SVG}title").text, "Fine-grained PPO, our loss"
                         + ", unseen" * ("facts" in file.name)}
        css = root.find(f"{SVG}style").text
        assert "prefers-color-scheme: dark" in css and ".s0 { --c" in css
        text = file.read_text()
        used = {name for found in re.findall(r' class="([^"]+)"', text) for name in found.split()}
        undefined = {name for name in used if not re.search(rf"\.{name}\b", css)}
        assert undefined <= {"chart", "wide"}               # these two concern the report's page
        assert "href" not in text and "url(" not in text and len(text) < 30_000


def test_a_figure_holds_its_values_as_points_and_as_text(folder):
    """Ours is at 75 and 100 in the second step, 87.5 on average. The axis is from 50 to 100.

    50 is at 256 and 100 at 16, so 87.5 is at 256 - 240 * 0.75 = 76.
    """
    root = ElementTree.parse(folder / "figures/held-out-rates.svg").getroot()
    told = root.find(f"{SVG}desc").text
    assert told.startswith("Win rate on test prompts, %, over the share. ")
    assert "Fine-grained PPO, our loss 80.0 at 0, 87.5 at 0.2" in told
    [ours] = [c for c in root.iter(f"{SVG}circle") if c.get("class") == "s0"]
    assert ours.get("cy") == "76.0"
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "Facts & sums" in texts and "share" in texts and "0.2" in texts
    assert ("Lines: means over 2 seeds. Bands: from the lowest to the highest seed. "
            "Dotted line: the SFT sample.") in texts
    told = ElementTree.parse(folder / "figures/held-out-facts.svg").find(f"{SVG}desc").text
    assert "our loss, unseen 50.0 at 0.2;" in told          # no value at 0, where all are seen
    drawn = ElementTree.parse(folder / "figures/accuracy.svg").iter(f"{SVG}circle")
    assert len(list(drawn)) == 3 * 2 + 3                    # three systems, two steps; the legend


def test_the_report_and_the_figures_hold_the_style_sheets_as_they_are(folder):
    page = (folder / "report.html").read_text()
    assert page.count("<style>") == 1
    for name in ("chart.css", "style.css"):
        assert (Path(figures.__file__).parent / name).read_text() in page
    css = ElementTree.parse(folder / "figures/accuracy.svg").find(f"{SVG}style").text
    assert css.startswith((Path(figures.__file__).parent / "chart.css").read_text())


def test_figures_are_the_same_bytes_when_they_are_drawn_again(folder):
    files = {file: file.read_bytes() for file in (folder / "figures").iterdir()}
    for file in files:
        file.unlink()
    main(Config(out=str(folder), profile="study", redraw=True))
    assert {file: file.read_bytes() for file in (folder / "figures").iterdir()} == files


@pytest.mark.parametrize("text, said", [
    ('{"profile": "quick", "systems": {}}', "expected the results of --profile study"),
    ('{"profile": "study", "knobs": {"miss": {}}, "labels": {}}', "damaged .KeyError")])
def test_redraw_refuses_other_results_and_leaves_the_report(tmp_path, text, said):
    (tmp_path / "results.json").write_text(text)
    (tmp_path / "report.html").write_text("as it was")
    with pytest.raises(UserError, match=said):
        main(Config(out=str(tmp_path), profile="study", redraw=True))
    assert (tmp_path / "report.html").read_text() == "as it was"


# ----- conclusions and signs as text --------------------------------------------------------------

STEPS = ("0", "0.25", "0.5", "1")
BY_STEP = {"rlhf": [(.5, .5)] * 4,
           "fine-grained-paper": [(.6, .4), (.6, .5), (.4, .5), (.5, .5)],     # 0, +, -, 0
           "fine-grained": [(.6, .62), (.6, .62), (.7, .72), (.6, .62)],       # + everywhere
           "imitation": [(.8, .8), (.7, .7), (.5, .5), (.2, .3)],              # +, +, 0, -
           "dpo-sft": [(.5, .5), (.5, .5), (.4, .4), (.5, .5)]}                # never ahead


def test_conclusions_say_from_which_step_on_a_lead_is_gone():
    """The 95% interval of two seeds is their mean +- 12.7 times half their distance.

    Ours minus imitation is -.19 +- .13, -.09 +- .13, .21 +- .13 and .36 +- .51 at the four steps.
    """
    results = results_of(BY_STEP, STEPS)
    knob = results["knobs"]["held-out"]
    always = "; greedy, ahead at every step"
    assert conclusions(knob, results["labels"]) == [told + always for told in (
        "Fine-grained PPO, paper's loss against PPO-RLHF: sampled, not ahead at 0, 0.5, 1",
        "Fine-grained PPO, our loss against PPO-RLHF: sampled, ahead at every step",
        "SFT on edits against PPO-RLHF: sampled, the lead is gone from 0.5 on",
        "DPO + SFT on edits against PPO-RLHF: sampled, ahead at no step",
        "Fine-grained PPO, our loss against SFT on edits: sampled, not ahead at 0, 0.25 (0.25, 1 "
        "may be chance)",
        "Fine-grained PPO, our loss against DPO + SFT on edits: sampled, ahead at every step (0, "
        "0.25, 1 may be chance)")]
    for step in knob["steps"]:
        step["lead"]["fine-grained"]["sampled"]["interval"] = [-0.01, 0.3]
        for cell in step["lead"]["imitation"].values():
            cell |= {"mean": None, "per_seed": [None, None]}
    told = conclusions(knob, results["labels"])
    assert "our loss against PPO-RLHF: sampled, ahead at every step (0, 0.25, 0.5, 1 may be " in (
        told[1]) and not any("SFT on edits" in line for line in told if "DPO" not in line)


def test_the_text_has_the_conclusions_below_the_table_and_the_signs_without_remedies():
    sign = "PPO-RLHF, run seed3/rlhf: the policy is far from the SFT policy, 1.2 nats per token"
    results = results_of(BY_STEP, STEPS) | {"signs": [f"{sign}; raise --beta or lower --lr"] * 22}
    text = study_text(results)
    table, rest = text.split("\n- Fine-grained PPO, paper's loss against PPO-RLHF: sampled, ", 1)
    assert "seconds of PPO-RLHF" in table and "raise" not in text
    assert rest.endswith("\n\nSigns of trouble: 22\n" + f"- {sign}\n" * 20
                         + "- and 2 more in results.json")
    assert "Signs" not in study_text(results | {"signs": []})
    section = knob_section("held-out", results["knobs"]["held-out"], results["labels"])
    assert "<li>SFT on edits against PPO-RLHF: sampled, the lead is gone from 0.5 on; " in section
