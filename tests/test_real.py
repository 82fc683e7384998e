"""The profile real: its files, the measure of made-up facts, the judge and the statistics."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from fgrlhf.checkpoint import FetchConfig
from fgrlhf.data.defacto import read_summaries
from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_edits, read_outputs, read_prompts
from fgrlhf.data.records import Edit, Output, Passage, Prompt, write_jsonl, write_outputs
from fgrlhf.engine.config import parser
from fgrlhf.judge import answer_to
from fgrlhf.real import analysis, files, judge, prompts, results, stages, tables
from fgrlhf.real.made_up import copied, made_up, named
from fgrlhf.reproduce.__main__ import Config as ReproduceConfig
from fgrlhf.reproduce.__main__ import check_flags
from fgrlhf.reproduce.report import text_table, write_report
from fgrlhf.reproduce.stages import Seed
from tests.small import ppo_folder
from tests.test_readme import config_of

ARTICLE = "Ann Lee of Leeds has 1,200 cows. The farm opened in May."


@pytest.mark.parametrize("summary, expected", [
    ("A farm in Leeds has 1,200 cows.", []),
    ("A farm in leeds has 1200 cows.", ["1200"]),              # another form counts as made up
    ("York is where Ann Lee lives.", []),                       # the first word is left aside
    ("The farm of ANN LEE opened in June 2019.", ["June", "2019"]),
    ("Ann's farm, the BBC says, is in the U.K.", ["BBC", "U", "K"]),
    ("The farm of Le\u0301o is old.", ["L\u00e9o"]),         # an accent as a character of its own
    ("", [])])
def test_made_up_lists_names_and_numbers_that_the_article_lacks(summary, expected):
    assert made_up(summary, ARTICLE) == expected
    assert made_up(summary, ARTICLE + " Le\u0301o") == [w for w in expected if w != "L\u00e9o"]


def test_named_counts_words_with_a_capital_or_a_digit_but_not_the_first_of_a_sentence():
    assert named("The farm of Ann has 3.5 cows and an iPad.") == ["Ann", "3.5", "iPad"]
    assert named('It rained. The end came. "Ann left," Bob said. He saw Tim.') == ["Bob", "Tim"]


def test_copied_is_the_share_of_neighbours_that_the_article_has():
    assert copied("the farm opened in June", ARTICLE) == 3 / 4
    assert copied("cows", ARTICLE) == copied("", ARTICLE) == 0.0


# ----- files --------------------------------------------------------------------------------------

def published(folder: Path) -> Path:
    """Writes both splits: a wrong and a right candidate each, and one article that both have."""
    folder.mkdir()
    for split, number in (("train", 1), ("val", 4)):
        article = f"{ARTICLE} It is in {split}."
        right = {"doc_id": number, "article": article, "candidate": "Ann Lee has cows.",
                 "has_error": False,
                 "feedback": {"summary": "", "evidence": "Ann Lee of Leeds has 1,200 cows."}}
        wrong = right | {"doc_id": number + 1, "article": article + " Yes.", "has_error": True,
                         "candidate": "Ann Lee has 90 cows.",
                         "feedback": {"summary": "Ann Lee has 1,200 cows.", "evidence": " "}}
        shared = wrong | {"doc_id": number + 2, "article": ARTICLE}
        last = wrong | {"doc_id": number + 9, "article": article + " No."}
        (folder / f"{split}.jsonl").write_text("".join(
            json.dumps(value) + "\n" for value in (right, wrong, shared, last)))
    return folder


def test_files_hold_edits_candidates_and_prompts_with_their_articles(tmp_path, capsys):
    data, out = published(tmp_path / "defacto"), tmp_path / "out"
    files.write_files(files.Config(data=str(data), out=str(out), test=2))
    assert [edit.id for edit in read_edits(out / "train-edits.jsonl")] == ["2", "3", "10"]
    first, last = read_edits(out / "val-edits.jsonl")           # not 6, whose article is in train
    assert (first.id, first.original, first.edited) == ("5", "Ann Lee has 90 cows.",
                                                        "Ann Lee has 1,200 cows.")
    assert first.prompt == f"{ARTICLE} It is in val. Yes."      # its evidence is blank
    assert "val.jsonl: left out 1 records" in capsys.readouterr().err
    assert read_edits(out / "judge-edits.jsonl") == [last] and last.id == "13"
    summaries = read_summaries(data / "train.jsonl")
    assert [s.output for s in summaries][:2] == ["Ann Lee has cows.", "Ann Lee has 90 cows."]
    right, wrong, _ = read_prompts(out / "val-prompts.jsonl")
    assert right == Prompt("4", "Ann Lee of Leeds has 1,200 cows.",
                           context=(Passage("article", f"{ARTICLE} It is in val."),))
    assert wrong.prompt == first.prompt
    texts = {name: [(output.output, judge.article_of(output)[-4:])
                    for output in read_outputs(out / f"{name}.json")]
             for name in ("candidates", "annotators")}
    assert texts["candidates"] == [("Ann Lee has cows.", "val."), ("Ann Lee has 90 cows.", "Yes.")]
    assert texts["annotators"] == [("Ann Lee has cows.", "val."),
                                   ("Ann Lee has 1,200 cows.", "Yes.")]


# ----- prompts ------------------------------------------------------------------------------------

THREE = 'Ann Lee has 1,200 cows. "They eat grass!" Bob says they do in May. Is it 3.5 tons?'


@pytest.mark.parametrize("words, expected", [
    (1, "Ann Lee has 1,200 cows."), (5, "Ann Lee has 1,200 cows."), (7, "Ann Lee has 1,200 cows."),
    (8, 'Ann Lee has 1,200 cows. "They eat grass!"'),
    (15, 'Ann Lee has 1,200 cows. "They eat grass!" Bob says they do in May.'), (19, THREE)])
def test_lead_has_the_first_sentences_that_fit_and_one_at_least(words, expected):
    assert prompts.lead(THREE, words) == expected


def test_lead_of_a_text_without_an_end_is_the_text():
    assert prompts.lead(" no end here ", 1) == "no end here"


@pytest.mark.parametrize("rule, expected", [
    ("lead-5", "Ann Lee of Leeds has 1,200 cows."), ("lead-12", ARTICLE),
    ("article", f"{ARTICLE} It is in val.")])
def test_every_file_has_the_prompts_of_the_rule(rule, expected, tmp_path):
    data = str(published(tmp_path / "defacto"))
    files.write_files(files.Config(data=data, out=str(tmp_path / "out"), test=2, prompt=rule))
    whole = {"4": f"{ARTICLE} It is in val.", "5": f"{ARTICLE} It is in val. Yes."}
    right, wrong, _ = read_prompts(tmp_path / "out/val-prompts.jsonl")
    assert right.prompt == expected and right.context == (Passage("article", whole["4"]),)
    wanted = whole["5"] if rule == "article" else expected
    assert wrong.prompt == read_edits(tmp_path / "out/val-edits.jsonl")[0].prompt == wanted
    answers = read_outputs(tmp_path / "out/candidates.json")
    assert [answer.instruction for answer in answers] == [expected, wanted]


def test_rules_are_named_and_others_refused():
    config = parser(files.Config)
    given = lambda rule: config.parse_args(["--data", "x", "--out", "y", "--prompt", rule]).prompt
    assert [given(rule) for rule in ("evidence", "lead", "lead-7", "article")] == [
        "evidence", "lead-60", "lead-7", "article"]
    assert config.parse_args(["--data", "x", "--out", "y"]).prompt == "evidence"
    for wrong in ("lead-0", "lead-", "lead-x", "Evidence", "lead-07"):
        with pytest.raises(UserError, match="expected evidence, article, lead or lead-N"):
            prompts.known_rule(wrong)


def test_a_prompt_shows_names_of_the_edit_of_both_and_of_the_original():
    """Added: Leeds and 1,200. Kept: Lee, not the first word. Taken out: York and 90."""
    edit = Edit("1", "LEEDS: Ann Lee, 90.", "Ann Lee of York has 90 cows.",
                "Ann Lee of Leeds has 1,200 cows.")
    assert prompts.names_of(edit) == {"added": ["leeds", "1,200"], "kept": ["lee"],
                                      "taken out": ["york", "90"]}
    other = Edit("2", "Bob.", "He is Bob.", "He is Tim.")
    assert prompts.shown([edit, other]) == {"added": (1, 3), "kept": (1, 1), "taken out": (2, 3)}


def test_the_counts_of_a_file_are_printed_by_rule(tmp_path, capsys):
    path = published(tmp_path / "defacto") / "train.jsonl"
    prompts.main(prompts.Config(data=str(path), rules="lead-1,article"))
    said = capsys.readouterr().out.splitlines()                 # three edits of the same names
    assert said[0] == "3 edits; names and numbers: 3 added, 3 kept, 3 taken out"
    assert [line.split() for line in said[4:]] == [
        ["lead-1", "7", "7", "100.0", "100.0", "0.0", "1.00"],
        ["article", "15", "17", "100.0", "100.0", "0.0", "1.00"]]


def test_another_rule_changes_the_commands_that_read_the_published_files_and_no_other():
    """So their records in a folder with other prompts do not count, and what needs them runs."""
    plans = []
    for rule in ((), ("lead-60",)):
        seed = Seed(0, Path("runs/x/seed0"), "cpu")
        stages.plan(seed, "data", *rule)
        plans.append({stage.name: stage for stage in seed.stages})
    changed = {name for name, stage in plans[0].items() if stage.text != plans[1][name].text}
    assert changed == {"seed0.data", "seed0.analysis", "seed0.probes"}
    for stage in plans[0].values():                             # all but the model follow the data
        changed |= {stage.name} if set(stage.needs) & changed else set()
    assert set(plans[0]) - changed == {"seed0.model"}


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_without_the_data_one_line_says_where_it_is_public(folder):
    with pytest.raises(UserError, match="git clone https://github.com/microsoft/DeFacto"):
        check_flags(ReproduceConfig(out="x", profile="real", data=folder))


def test_data_and_adapters_are_refused_where_they_are_not_read(tmp_path):
    data = str(published(tmp_path / "defacto"))
    with pytest.raises(UserError, match="--data and --prompt: expected --profile real"):
        check_flags(ReproduceConfig(out="x", data=data))
    with pytest.raises(UserError, match="--data and --prompt: expected --profile real"):
        check_flags(ReproduceConfig(out="x", prompt="lead-60"))
    with pytest.raises(UserError, match="expected no --lora-rank"):
        check_flags(ReproduceConfig(out="x", profile="real", data=data, lora_rank=4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_is_a_command_that_its_script_understands(dtype):
    seed = Seed(3, Path("runs/x/seed3"), "cpu", dtype)
    stages.plan(seed, "data")
    names = [stage.name for stage in seed.stages]
    for stage in seed.stages:
        assert all(names.index(need) < names.index(stage.name) for need in stage.needs)
        words = shlex.split(stage.text)
        if words[2] != "fgrlhf.checkpoint":
            parser(config_of(words)).parse_args(words[2 + (words[1] in ("-m", "eval.py")):])
    first = shlex.split(seed.stages[0].text)[3:]
    assert parser(FetchConfig).parse_args(first[1:]).out == str(Path(stages.MODEL).parent)


def test_ppo_rlhf_has_its_tuned_rates_and_fine_grained_ppo_its_own():
    seed = Seed(0, Path("runs/x/seed0"), "cpu", "float32")
    stages.plan(seed, "data")
    commands = {stage.name: shlex.split(stage.text) for stage in seed.stages}
    rates = {}
    for name in stages.POLICIES:
        words = commands[f"seed0.{name}"]
        rates[name] = [value for flag, value in zip(words, words[1:])
                       if flag in ("--lr", "--value-lr")]
    assert rates == {"fine-grained-paper": ["5e-5"], "fine-grained": ["1.5e-4"],
                     "rlhf": ["1.5e-4", "1.5e-4"]}


# ----- judge --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = ppo_folder(tmp_path_factory.mktemp("real"))
    prompts = [Prompt(str(i), f"name {i}", context=(Passage("article", ARTICLE),))
               for i in range(3)]
    write_jsonl(folder / "prompts-articles.jsonl", prompts)
    for name, texts in (("sft-sampled", ("A red Ann", "The Bob", "it")),
                        ("sft-greedy", ("A red", "is Bob", "in May"))):
        write_outputs(folder / f"{name}.json",
                      [answer_to(prompt, text, "p") for prompt, text in zip(prompts, texts)])
    lines = [{"step": step, "responses": [
        {"prompt": 1, "id": "2", "tokens": 4, "kl": 0.5 * step, "reward": 1.0,
         "output": "the May Bob"},
        {"prompt": 0, "id": "0", "tokens": 4, "kl": 0.1, "reward": 1.0, "output": "it"}]}
        for step in (1, 2, 3, 4)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_judge_measures_every_answer_and_the_samples_of_some_iterations(folder, tmp_path):
    judge.judge(judge.Config(
        reward=str(folder / "sequence"), samples=str(folder / "samples.jsonl"),
        outputs=f"{folder / 'sft-sampled.json'},{folder / 'sft-greedy.json'}",
        prompts=str(folder / "prompts-articles.jsonl"), every=3, per_step=1,
        out=str(tmp_path / "judged.json"), device="cpu"))
    found = json.loads((tmp_path / "judged.json").read_text())
    sampled, greedy = found["answers"]["sft-sampled"], found["answers"]["sft-greedy"]
    assert [row["made_up"] for row in sampled] == [0, 1, 0]
    assert [row["named"] for row in greedy] == [0, 1, 1]
    assert [row["words"] for row in sampled] == [3, 2, 1]
    assert [(row["step"], row["kl"], row["made_up"]) for row in found["samples"]] == [
        (1, 0.5, 1), (3, 1.5, 1)]
    assert len({row["reward"] for row in sampled}) == 3
    judge.judge(judge.Config(reward=str(folder / "sequence"), device="cpu",
                             outputs=str(folder / "sft-sampled.json"),
                             out=str(tmp_path / "without.json")))
    assert json.loads((tmp_path / "without.json").read_text()) == {
        "answers": {"sft-sampled": sampled}, "samples": []}


def test_judge_refuses_answers_without_an_article():
    with pytest.raises(UserError, match="expected a context with the article"):
        judge.article_of(Output("name", "x", "p"))


@pytest.mark.parametrize("row, said", [
    ({"step": 1, "responses": [{"output": "x"}]}, "samples.jsonl:1: id: expected this field"),
    ({"step": 1, "responses": [{"id": "0", "output": "x", "kl": "y"}]}, "samples.jsonl:1: kl:"),
    ({"step": 1}, "samples.jsonl:1: responses: expected this field"),
    ({"step": 1, "responses": [{"id": "9", "output": "x", "kl": 0}]}, "got no record '9'")])
def test_judge_refuses_samples_of_another_form_or_other_prompts(folder, tmp_path, row, said):
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=said):
        judge.read_samples(judge.Config(reward="x", outputs="x", out="x",
                                        samples=str(tmp_path / "samples.jsonl"),
                                        prompts=str(folder / "prompts-articles.jsonl")))


def test_judge_wants_samples_and_prompts_together(folder, tmp_path):
    with pytest.raises(UserError, match="--samples and --prompts: expected both or neither"):
        judge.judge(judge.Config(reward="x", outputs="x", out="x", samples="x"))


# ----- error analysis -----------------------------------------------------------------------------

def test_types_of_words_by_hand():
    summary = "Anns 12 red cows left Leeds in May, 2019."
    pieces = ["Anns", " 1", "2", " red", " cows", " left", " Le", "eds", " in", " May", ",",
              " 2019", "."]
    spans, start = [], 0
    for piece in pieces:
        spans.append((start, start + len(piece)))
        start += len(piece)
    assert summary == "".join(pieces)
    assert analysis.types_of(summary, "Leeds: 12 cows left.", spans) == [
        "other word, not seen", "number, seen", "number, seen", "other word, not seen",
        "other word, seen", "other word, seen", "name, seen", "name, seen", "function word",
        "name, not seen", "punctuation", "number, not seen", "punctuation"]


def test_by_type_counts_and_compares_the_tokens_of_each_type():
    token = lambda removed, reward: analysis.Token("x", "punctuation", removed, reward)
    table = analysis.by_type([token(True, -1.0), token(True, 2.0), token(False, 1.0),
                              token(False, 1.0)])
    assert table["punctuation"] == {"tokens": 4, "removed": 2, "r_removed": 0.5, "r_kept": 1.0,
                                    "auc": 0.5}
    assert table["name, seen"] == {"tokens": 0, "removed": 0, "r_removed": None, "r_kept": None,
                                   "auc": None}


# ----- statistics ---------------------------------------------------------------------------------

def rows(made, named, words, reward=None) -> list[dict]:
    rewards = reward or [0.0] * len(made)
    return [{"made_up": m, "named": n, "words": w, "copied": 0.5, "reward": r,
             "tokens": 48 if w > 9 else w}
            for m, n, w, r in zip(made, named, words, rewards)]


def write_judged(folder: Path, systems: dict[str, list[dict]]) -> None:
    (folder / "judged").mkdir(parents=True)
    for name, found in systems.items():
        answers = {f"{name}-{decoding}": found for decoding in ("sampled", "greedy")}
        (folder / f"judged/{name}.json").write_text(json.dumps({"answers": answers, "samples": []}))


def test_systems_table_has_rates_of_all_summaries_together_and_changes_against_sft(tmp_path):
    write_judged(tmp_path, {"sft": rows([2, 2], [4, 2], [10, 20], [1.0, 2.0]),
                            "rlhf": rows([1, 0], [1, 3], [5, 10], [2.0, 2.0])})
    tests = {name: [results.judged(tmp_path, name)] for name in ("sft", "rlhf")}
    table = results.systems_table(tests)
    own = {name: cell["mean"] for name, cell in table["rlhf"]["metrics"].items()}
    assert own["named"] == 2 and own["cut_off"] == 0.5
    assert own["made_up"] == 0.5 and own["made_up_rate"] == 1 / 4 and own["made_up_any"] == 0.5
    assert own["made_up_change"] == pytest.approx(0.5 / 2 - 1)
    assert own["made_up_rate_change"] == pytest.approx((1 / 4) / (4 / 6) - 1)
    assert own["words_change"] == pytest.approx(-0.5) and own["win_rate"] == 0.75    # a win, a tie
    assert "win_rate" not in table["sft"]["metrics"]
    assert table["rlhf"]["metrics"]["words_change"]["interval"] == [-0.5, -0.5]    # of either


def test_an_empty_summary_loses_whatever_its_reward_and_ties_with_another_one(tmp_path):
    write_judged(tmp_path, {"sft": rows([0] * 3, [1] * 3, [5, 5, 0], [1.0, 1.0, 1.0]),
                            "rlhf": rows([0] * 3, [1] * 3, [0, 5, 0], [9.0, 0.0, 9.0])})
    tests = {name: [results.judged(tmp_path, name)] for name in ("sft", "rlhf")}
    table = results.systems_table(tests | dict.fromkeys(results.ORDER[2:], tests["rlhf"]))
    own = {name: cell["mean"] for name, cell in table["rlhf"]["metrics"].items()}
    assert own["win_rate"] == pytest.approx(0.5 / 3) and own["empty"] == pytest.approx(2 / 3)
    assert own["win_rate_by_reward"] == pytest.approx(2 / 3)
    said = results.reading(table)[1]
    assert "66.7% of the samples" in said and "it would win 66.7% and 66.7%" in said


def test_interval_of_a_mean_is_that_of_the_central_limit():
    """1.96 standard errors of the mean of 400 summaries."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = results.estimate([({"win": values},)], lambda one: one["win"].mean())
    half = 1.96 * values.std() / 20
    assert found["mean"] == pytest.approx(values.mean())
    assert found["interval"] == pytest.approx([values.mean() - half, values.mean() + half],
                                              abs=0.03)


def test_several_seeds_give_students_interval():
    seeds = [({"win": np.full(3, value)},) for value in (0.5, 0.7)]
    found = results.estimate(seeds, lambda one: one["win"].mean())
    assert found["per_seed"] == pytest.approx([0.5, 0.7])
    assert found["interval"] == pytest.approx([0.6 - 1.2706, 0.6 + 1.2706], abs=1e-3)


def test_a_start_that_makes_nothing_up_has_no_change_and_no_interval(tmp_path):
    write_judged(tmp_path, {"sft": rows([0, 0], [0, 0], [10, 20]),
                            "rlhf": rows([1, 0], [1, 3], [5, 10])})
    tests = {name: [results.judged(tmp_path, name)] for name in ("sft", "rlhf")}
    metrics = results.systems_table(tests)["rlhf"]["metrics"]
    for name in ("made_up_change", "made_up_rate_change"):
        assert metrics[name]["mean"] is None and metrics[name]["interval"] is None
    assert results.percent(metrics["made_up_change"]) == "-"
    assert results.percent(metrics["words_change"]) == "-50% [-50, -50]"


def test_results_and_report_of_a_whole_run(folder, tmp_path):
    """Every system with the same answers: no change, and a win rate of a half."""
    seed = tmp_path / "seed0"
    summaries = [json.dumps({"id": str(i), "prompt": f"name {i}", "original": f"the {i} red Ann",
                             "edited": f"the {i} red Bob"}) for i in range(3)]
    (seed / "data").mkdir(parents=True)
    (seed / "data/val-edits.jsonl").write_text("\n".join(summaries) + "\n")
    shown = {"edits/pair_accuracy": 0.9, "edits/pair_accuracy_95": [0.8, 1.0],
             "edits/edit_auc_within": 0.7, "edits/edit_auc_within_95": [0.6, 0.8]}
    for name in tables.REWARDS:
        (seed / name).mkdir()
        (seed / name / "done.json").write_text(json.dumps(shown))
        (seed / name / "reward").symlink_to(folder / "token")
    token = ["Ann | the red Ann", "name, seen", True, 1.5]
    figures = {"detects": {"lowest r": 0.6}, "eos": {"edits": [1.9, 0.2]},
               "errors": {"intrinsic": {"summaries": 2, "auc_within": 0.5}},
               "words": {"name, seen": {"tokens": 1, "removed": 1, "r_removed": 1.5,
                                        "r_kept": None, "auc": None}},
               "worst": {"taken out": [token], "kept": []}}
    (seed / "analysis.json").write_text(json.dumps(
        {"detects": {"length": 0.5}} | {str(seed / f"{name}/reward"): figures
                                        for name in stages.TOKEN_LEVEL}))
    probed = dict.fromkeys(tables.PROBES, [0.8]) | {
        "reliability": [{"pairs": 3, "P": 0.75, "right": 2 / 3}]}
    (seed / "probes.json").write_text(json.dumps({"paper": probed, "ours": probed}))
    (seed / "outputs").mkdir(), (seed / "judged").mkdir()
    line = {"step": 1, "rollout/episodes": 8.0, "rollout/reward": 1.0, "rollout/kl_k1": 0.1,
            "rollout/length": 5.0}
    for name in (*results.ORDER, "published"):
        found = rows([1, 0], [2, 1], [5, 10], [1.0, 2.0])
        kinds = results.PUBLISHED if name == "published" else (f"{name}-sampled", f"{name}-greedy")
        samples = [one | {"step": 1, "kl": 0.5} for one in found]
        (seed / f"judged/{name}.json").write_text(json.dumps(
            {"answers": dict.fromkeys(kinds, found), "samples": samples}))
        if name in stages.POLICIES:
            (seed / name).mkdir()
            (seed / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (seed / f"outputs/{name}-greedy.json").write_text((folder / "sft-greedy.json").read_text())
    found = results.collect([seed])
    assert found["systems"]["rlhf"]["metrics"]["win_rate"]["mean"] == 0.5
    assert found["systems"]["annotators"]["metrics"]["made_up"]["mean"] == 0.5
    assert len(found["reading"]) == 6 and found["signs"] == [] and "-0%" not in text_table(found)
    curves = {(c["metric"], c["system"]): c for c in found["curves"]}
    assert curves["made_up", "rlhf"]["x_kl"] == [0.5] and curves["judge", "rlhf"]["y"] == [1.5]
    assert curves["kl_k1", "rlhf"]["y"] == [0.5]
    assert curves["reliability", "rm-ours"]["x_confidence"] == [25, 75]
    assert curves["reliability", "rm-ours"]["y"] == pytest.approx([1 / 3, 2 / 3])
    write_report(tmp_path / "report.html", found)
    page = (tmp_path / "report.html").read_text()
    assert "Made-up facts" in page and "over KL from the SFT policy" in page
    assert "a token that the annotator took out" in page
    silent = json.loads((seed / "judged/rlhf.json").read_text())
    silent["samples"] = [one | {"named": 0, "made_up": 0} for one in silent["samples"]]
    (seed / "judged/rlhf.json").write_text(json.dumps(silent))
    found = results.collect([seed])                     # samples that name nothing have no rate
    (rate,) = (c["y"] for c in found["curves"]
               if (c["metric"], c["system"]) == ("made_up_rate", "rlhf"))
    assert rate == [None] and json.dumps(found, allow_nan=False)
    write_report(tmp_path / "report.html", found)


# ----- DeFacto ------------------------------------------------------------------------------------

def test_the_measure_follows_the_annotators(data_dir):
    """The rates that the notes of the report give."""
    found = {True: [0, 0], False: [0, 0], "edit": [0, 0]}
    for line in (data_dir / "defacto/val.jsonl").read_text().splitlines():
        record = json.loads(line)
        texts = [(record["has_error"], record["candidate"])]
        texts += [("edit", record["feedback"]["summary"])] * record["has_error"]
        for kind, text in texts:
            found[kind][0] += len(made_up(text, record["article"]))
            found[kind][1] += len(named(text))
    assert {kind: round(made / count, 2) for kind, (made, count) in found.items()} == {
        True: 0.37, "edit": 0.12, False: 0.13}
