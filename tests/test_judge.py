"""Judges: who wins by hand-made answers; answers come back in the order of their prompts."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as evaluation
from fgrlhf.checkpoint import save_model
from fgrlhf.collect.client import Unanswered
from fgrlhf.collect.judge import by_llm
from fgrlhf.collect.protocol import Reply
from fgrlhf.data import records
from fgrlhf.data.fields import UserError
from fgrlhf.data.outputs import joined
from fgrlhf.data.readers import read_annotations, read_outputs
from fgrlhf.data.records import Annotation, Edit, Output, Passage, Prompt, Span
from fgrlhf.encode import encode_prompt
from fgrlhf.engine.config import parse
from fgrlhf.engine.encoding import Encoding
from fgrlhf.judge import (
    answers, best_of, by_reward, check_same_prompts, preferences_of, rewards_of)
from fgrlhf.reward import RewardModel, save_reward
from fgrlhf.rollout import Rollout
from fgrlhf.sequences import pack
from fgrlhf.simulate.oracle import OracleJudge, by_oracle
from fgrlhf.simulate.world import World
from fgrlhf.tokenizer import train
from tests.small import llama

WORLD = World(0)
LAND = WORLD.lands[0]
ASKED = f"Name the river and crop of {LAND}."
RIGHT = f"Its river is {WORLD.facts[LAND, 'river']}. Its crop is {WORLD.facts[LAND, 'crop']}."
ONE_WRONG, ALL_WRONG = RIGHT.replace("Its crop is", "Its crop was"), "No."       # 2 and 3 errors


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train([ASKED, RIGHT] * 5, 300, tmp_path_factory.mktemp("t") / "t.model")


def outputs(*texts: str) -> list[Output]:
    return [Output(ASKED, text, "m") for text in texts]


def saved(path: Path, records: list[dict]) -> Path:
    path.write_text(json.dumps(records))
    return path


def win_rate(*flags) -> dict:
    """What `python eval.py win-rate` prints."""
    config = parse(evaluation.WinRateConfig, argv=[*map(str, flags)])
    return json.loads(json.dumps(evaluation.win_rate(config), allow_nan=False))


def test_by_oracle_prefers_fewer_errors():
    assert by_oracle(WORLD, outputs(RIGHT, ONE_WRONG, ALL_WRONG),
                     outputs(ONE_WRONG, ONE_WRONG, RIGHT)) == [1, 0.5, 0]


def test_by_oracle_refuses_prompts_of_another_world():
    """There would be no item to find missing or wrong: a tie that means nothing."""
    assert LAND not in World(1).lands
    for world, texts in ((World(1), outputs(RIGHT)), (WORLD, [Output("Who are you?", "I.", "m")])):
        with pytest.raises(UserError, match=f"no request of world {world.seed}"):
            by_oracle(world, texts, texts)


def test_oracle_judge_reads_its_reference_once_and_compares(tmp_path):
    records.write_jsonl(tmp_path / "dev.jsonl", [Prompt("a", ASKED), Prompt("b", ASKED)])
    records.write_outputs(tmp_path / "ref.json", outputs(ONE_WRONG, ALL_WRONG))
    judge = OracleJudge.load(0, str(tmp_path / "dev.jsonl"), str(tmp_path / "ref.json"))
    assert judge.reference_errors == [2, 3]
    assert judge.compare(outputs(RIGHT, ALL_WRONG)) == {"eval/win_rate": 0.75, "eval/errors": 1.5}
    with pytest.raises(UserError, match="expected the 2 instructions"):
        judge.compare(outputs(RIGHT))


def test_oracle_judge_joins_a_reference_in_another_order(tmp_path):
    asked = [ASKED, f"Name the crop of {LAND}."]
    records.write_jsonl(tmp_path / "dev.jsonl", [Prompt("a", asked[0]), Prompt("b", asked[1])])
    records.write_outputs(tmp_path / "ref.json", [Output(asked[1], ALL_WRONG, "m"),
                                                  Output(asked[0], RIGHT, "m")])
    load = lambda: OracleJudge.load(0, str(tmp_path / "dev.jsonl"), str(tmp_path / "ref.json"))
    errors = load().reference_errors
    assert errors[0] == 0 and errors[1] > 0
    records.write_outputs(tmp_path / "ref.json", [Output(asked[1], ALL_WRONG, "m")])
    with pytest.raises(UserError, match=r"ref\.json: expected an answer to every prompt of "
                                        rf".*dev\.jsonl, got 0 of 1 to '{ASKED}'"):
        load()


def test_answers_name_the_world_of_their_prompts_and_the_oracle_refuses_another(tmp_path, tokenizer,
                                                                              capsys):
    """The dev evaluations of PPO check both of their files, and win-rate its two."""
    dev, ref = tmp_path / "dev.jsonl", tmp_path / "ref.json"
    prompt = Prompt("dev-0", ASKED, dataset="world 0,coupled=1")
    records.write_jsonl(dev, [prompt])
    policy = llama(vocab_size=300, max_seq_len=320)
    records.write_outputs(ref, answers(policy, tokenizer, [prompt], "plain", 4, 0.0, 0))
    assert json.loads(ref.read_text())[0]["dataset"] == "world 0,coupled=1"
    judge = OracleJudge.load("0,coupled=1", str(dev), str(ref))
    again = answers(policy, tokenizer, judge.prompts, "plain", 4, 0.0, 0)
    assert judge.compare(again)["eval/win_rate"] == 0.5 and capsys.readouterr().err == ""
    flags = ("--judge", "oracle", "--outputs", ref, "--reference", ref, "--world")
    assert win_rate(*flags, "0,coupled=1")["ties"] == 1
    with pytest.raises(UserError, match=r"ref\.json: record 1: dataset: expected world 0, "):
        win_rate(*flags, "0")
    with pytest.raises(UserError, match=r"dev\.jsonl: record 'dev-0': dataset: expected world 0, "):
        OracleJudge.load(0, str(dev), str(ref))
    records.write_jsonl(dev, [replace(prompt, dataset=None)])
    with pytest.raises(UserError, match=r"ref\.json: record 1: dataset: expected world 0, "):
        OracleJudge.load(0, str(dev), str(ref))
    # A dev file from before the key: one line on stderr at the start, none at each evaluation.
    judge = OracleJudge.load("0,coupled=1", str(dev), str(ref))
    judge.compare(outputs(RIGHT))
    assert capsys.readouterr().err.count("\n") == 1


def test_same_prompts_refuses_another_order():
    first, second = Output("a", "", "m"), Output("b", "", "m")
    check_same_prompts([first, second], [first, second])
    with pytest.raises(UserError, match="same order"):
        check_same_prompts([first, second], [second, first])


# ----- joining ------------------------------------------------------------------------------------

def answered(instruction: str, text: str, input: str | None = None) -> Output:
    return Output(instruction, text, "m",
                  other=() if input is None else (("input", json.dumps(input)),))


def test_joined_follows_the_reference_by_instruction_and_input():
    """Blank input is none. Two answers to one prompt keep their order."""
    ours = [answered("q", "1", "B"), answered("q", "2"), answered("r", "3"), answered("q", "4", ""),
            answered("q", "5", "A")]
    reference = [answered("q", "", "A"), answered("q", "", ""), answered("q", ""),
                 answered("r", ""), answered("q", "", "B")]
    assert [o.output for o in joined(ours, reference)] == ["5", "2", "4", "3", "1"]


@pytest.mark.parametrize("seed", range(20))
def test_joined_undoes_any_shuffle(seed):
    rng = random.Random(seed)
    reference = [answered(f"q{rng.randrange(30)}", str(i), rng.choice([None, "A", "B"]))
                 for i in range(40)]
    once = {(o.instruction, dict(o.other).get("input")): o for o in reference}.values()
    shuffled = rng.sample(list(once), len(once))
    assert joined(shuffled, list(once)) == list(once)


@pytest.mark.parametrize("ours, reference, said", [
    ([("q", "A")], [("q", "B")], "A: expected an answer to every prompt of B, got 0 of 1 to 'q' "
                                 "with the input 'B'; answer both from one prompt file"),
    ([("q", None)], [("q", "B")], "A: .* got 0 of 1 to 'q' with the input 'B';"),
    ([("q", None)], [("q", None), ("r", None), ("s", None)],
     "A: .* got 0 of 1 to 'r' and too few to 1 more;"),
    ([("q", None), ("r", "X")], [("q", None)], "B: .* of A, got 0 of 1 to 'r' with the input 'X';"),
    ([("q", None)] * 2, [("q", None)], "B: .* got 1 of 2 to 'q';")])
def test_joined_names_the_answer_that_is_missing(ours, reference, said):
    make = lambda prompts: [answered(instruction, "", input) for instruction, input in prompts]
    with pytest.raises(UserError, match=f"^{said}"):
        joined(make(ours), make(reference), ("A", "B"))


def test_joined_refuses_an_input_that_is_no_text():
    with pytest.raises(UserError, match="output to 'q': input: expected a string, got 5"):
        joined([answered("q", "", 5)], [answered("q", "", 5)])


def with_passage(text: str, title: str | None) -> Output:
    passages = [] if title is None else [{"title": title, "text": "Text."}]
    return Output("q", text, "m", other=(("context", json.dumps(passages)),))


def test_joined_tells_equal_questions_on_other_passages_apart():
    ours, theirs = ([with_passage(text, title) for text, title in (("1", "A"), ("2", "B"))],
                    [with_passage(text, title) for text, title in (("", "B"), ("", "A"))])
    assert [o.output for o in joined(ours, theirs)] == ["2", "1"]
    other_keys = replace(theirs[1], other=(("context", '[{"text": "Text.", "title": "A"}]'),))
    assert [o.output for o in joined(ours, [theirs[0], other_keys])] == ["2", "1"]
    with pytest.raises(UserError, match=r"A: .* got 0 of 1 to 'q' with the context '.*C"):
        joined(ours, [theirs[0], with_passage("", "C")], ("A", "B"))
    assert joined(ours, [answered("q", "")] * 2) == ours               # only one file has passages


def test_by_reward_refuses_passages_that_only_one_file_has(tokenizer):
    """With the template "qa" the two answers would be judged behind different prompts."""
    model = RewardModel(llama(vocab_size=300, max_seq_len=320), "sequence")
    ours, theirs = [with_passage("It", "A")], [with_passage("No", None)]
    assert by_reward(model, tokenizer, Encoding("plain"), ours, theirs) != [None]
    with pytest.raises(UserError, match="expected the same context as in the reference"):
        by_reward(model, tokenizer, Encoding("qa"), ours, theirs)


def test_win_rate_joins_two_files_by_instruction_and_input_in_any_order(tmp_path):
    """The oracle ignores `input`, so a wrong join would give other errors."""
    texts = {"A": RIGHT, "B": ONE_WRONG, "": ALL_WRONG}
    ours = saved(tmp_path / "ours.json", [{"instruction": ASKED, "input": i, "output": texts[i]}
                                          for i in ("A", "B", "")])
    theirs = saved(tmp_path / "theirs.json", [{"instruction": ASKED, "input": i, "output": texts[i]}
                                              for i in ("", "B", "A")])
    flags = ("--judge", "oracle", "--world", 0, "--outputs", ours, "--reference")
    found = win_rate(*flags, theirs)
    assert (found["wins"], found["ties"], found["losses"]) == (0, 3, 0)
    saved(theirs, [{"instruction": ASKED, "input": "A", "output": RIGHT}] * 3)
    with pytest.raises(UserError, match=r"ours\.json: expected an answer to every prompt of "
                                        r".*theirs\.json, got 1 of 3 to .* with the input 'A'"):
        win_rate(*flags, theirs)


def test_outputs_without_generator_are_named_after_their_file(tmp_path):
    path = saved(tmp_path / "davinci.json", [
        {"instruction": ASKED, "input": "", "output": RIGHT},
        {"instruction": ASKED, "output": "", "generator": None},
        {"instruction": ASKED, "output": "", "generator": "mine"}])
    assert [o.generator for o in read_outputs(path)] == ["davinci", "davinci", "mine"]
    found = win_rate("--judge", "oracle", "--world", 0, "--outputs", path, "--reference", path)
    assert (found["win_rate"], found["ties"]) == (0.5, 3)
    with pytest.raises(UserError, match="record 1: generator: expected a string.*got 7"):
        read_outputs(saved(path, [{"instruction": "q", "output": "x", "generator": 7}]))


@pytest.mark.parametrize("judge, flags, said", [
    ("oracle", ("--world", 0, "--limit", 3), "--limit: expected --judge human, got --judge oracle"),
    ("reward", ("--reward", "r", "--judgements", "j.jsonl"),
     "--judgements: expected --judge llm or human, got --judge reward"),
    ("llm", ("--model", "m", "--judgements", "j", "--judges", 2), "--judges: expected --judge hum"),
    ("oracle", ("--world", 0, "--reward", "r"), "--reward: expected --judge reward, got"),
    ("oracle", ("--world", 0, "--template", "chatml"), "--template: expected --judge reward, got"),
    ("oracle", ("--world", 0, "--base-url", "u"), "--base-url: expected --judge llm, got"),
    ("oracle", ("--world", 0, "--annotator", "me"), "--annotator: expected --judge human, got"),
    ("human", ("--judgements", "a.json"), "--judgements a.json: .* the path of --outputs;"),
    ("llm", ("--model", "m", "--judgements", "b.cache.json"), "--judgements b.cache.json: .*--ref"),
    ("llm", ("--model", "m", "--judgements", "b.json"),
     "--judgements b.cache.jsonl: .* the path of --reference;")])
def test_win_rate_refuses_flags_that_the_judge_does_not_use_and_files_that_are_inputs(
        judge, flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "read_outputs", None)
    reference = "b.cache.json" if "b.cache.json" in flags else "b.cache.jsonl"
    with pytest.raises(UserError, match=said):
        win_rate("--judge", judge, "--outputs", "a.json", "--reference", reference, *flags)


# ----- recorded judgements ------------------------------------------------------------------------

RECORDED = json.loads((Path(__file__).parent / "fixtures/alpaca_eval.json").read_text())


def judgements(path: Path, preferences: list, lengths: list[int] | None = None) -> Path:
    lengths = lengths or [1] * len(preferences)
    return saved(path, [{"instruction": str(i), "output_1": "a", "output_2": "x" * length,
                         "preference": preference}
                        for i, (preference, length) in enumerate(zip(preferences, lengths))])


def test_preferences_of_annotations_are_those_of_the_second_output(tmp_path):
    path = judgements(tmp_path / "a.json", [1, 2, 1.5, 0, None, 1.25, 2.0])
    assert preferences_of(read_annotations(path)) == [0, 1, 0.5, 0.5, None, 0.25, 1]


@pytest.mark.parametrize("k", range(len(RECORDED["files"])))
def test_win_rate_of_annotations_is_alpacaevals(k, tmp_path):
    """Random preferences with nulls and weights, and what AlpacaEval's functions said of them."""
    case = RECORDED["files"][k]
    theirs = case["found"]
    path = judgements(tmp_path / "a.json", case["preferences"], case["lengths"])
    found = win_rate("--judge", "annotations", "--annotations", path)
    for name in ("win_rate", "standard_error", "discrete_win_rate", "discrete_standard_error"):
        percent = theirs[name]
        assert found[name] == (None if percent is None else pytest.approx(percent / 100, abs=1e-9))
    assert [found[name] for name in ("wins", "losses", "ties", "avg_length")] == [
        theirs[name] for name in ("n_wins", "n_wins_base", "n_draws", "avg_length")]
    assert len(case["preferences"]) - found["left_out"] == theirs["n_total"]


def test_empty_answers_are_counted_on_stderr(tmp_path, capsys):
    files = [str(saved(tmp_path / name, [
        {"instruction": f"{ASKED} {k}", "output": text, "generator": "m"}
        for k, text in enumerate(texts)]))
        for name, texts in (("a.json", ["", " \n", RIGHT]), ("b.json", ["No.", "No.", "No."]))]
    said = f"2 of 3 answers of {files[0]} are empty\n"
    win_rate("--judge", "oracle", "--world", 0, "--outputs", files[0], "--reference", files[1])
    assert capsys.readouterr().err == said
    evaluation.show_answers(evaluation.AnswersConfig(outputs=tuple(files)))
    assert capsys.readouterr().err == said
    path = saved(tmp_path / "annotations.json", [
        {"instruction": ASKED, "output_1": one, "output_2": "No.", "generator_1": "a",
         "generator_2": "b", "preference": 2} for one in ("", RIGHT)])
    win_rate("--judge", "annotations", "--annotations", path)
    assert capsys.readouterr().err == f"1 of 2 answers of {path}, output_1, are empty\n"


def test_win_rate_says_how_many_judgements_failed(tmp_path, capsys):
    """Two of three: the nulls are no ties."""
    path = judgements(tmp_path / "a.json", [2, 2, 1, None, None, None])
    found = win_rate("--judge", "annotations", "--annotations", path)
    assert found["win_rate"] == found["discrete_win_rate"] == pytest.approx(2 / 3, abs=1e-12)
    assert (found["left_out"], found["ties"]) == (3, 0)
    assert capsys.readouterr().err == "3 of 6 pairs left out: no usable judgement\n"


def test_win_rate_refuses_a_file_of_failed_judgements(tmp_path):
    path = judgements(tmp_path / "a.json", [None, None])
    with pytest.raises(UserError, match=r"a\.json: expected at least one preference, got none for "
                                        "2 pairs"):
        win_rate("--judge", "annotations", "--annotations", path)


# ----- a reward model -----------------------------------------------------------------------------

def test_by_reward_prefers_the_higher_reward(tokenizer):
    """Each answer scored alone by R(x, y); a blank answer is a single EOS."""
    torch.manual_seed(0)
    model = RewardModel(llama(vocab_size=300, max_seq_len=160), "sequence")
    texts = [RIGHT, ONE_WRONG, ALL_WRONG, ""]
    prompt = encode_prompt(tokenizer, Prompt("p", ASKED), "plain", 100)
    R = [model.sequence_rewards(pack([prompt], [tokenizer.encode(t, eos=True)])).item()
         for t in texts]
    others = texts[1:] + texts[:1]
    expected = [float(R[i] > R[(i + 1) % 4]) for i in range(4)]
    plain = Encoding("plain")
    assert by_reward(model, tokenizer, plain, outputs(*texts), outputs(*others)) == expected
    assert 0 < sum(expected) < 4
    assert by_reward(model, tokenizer, Encoding("plain"), outputs(RIGHT), outputs(RIGHT)) == [0.5]
    best = best_of(model, tokenizer, plain, [outputs(*texts), outputs(*others)])
    assert [o.output for o in best] == [a if R[i] > R[(i + 1) % 4] else b
                                        for i, (a, b) in enumerate(zip(texts, others))]


def test_rewards_of_answers_to_a_long_prompt_are_those_of_each_alone(tokenizer, monkeypatch):
    """Three prompts with four answers each, in one pass. Two of the four are equal."""
    model, asked = RewardModel(llama(vocab_size=300, max_seq_len=320), "token"), []
    texts = ["No.", "It", "Its", "No."]
    answers = [replace(answer, instruction=f"{ASKED} {k} " + "the river " * 9)
               for k in range(3) for answer in outputs(*texts)]
    call = RewardModel.sequence_rewards
    monkeypatch.setattr(RewardModel, "sequence_rewards",
                        lambda self, rows: (asked.append(len(rows.tokens)), call(self, rows))[1])
    found, seen = rewards_of(model, tokenizer, Encoding("plain"), answers)
    assert asked == [9] and found[0] == found[3] != found[1]
    monkeypatch.setattr("fgrlhf.judge.TOGETHER", 1)
    alone, _ = rewards_of(model, tokenizer, Encoding("plain"), answers)
    assert asked[1:] == [1] * 9 and found == pytest.approx(alone, abs=1e-5)


def test_by_reward_tells_answers_that_do_not_fit_from_ties(tokenizer, capsys):
    """A context of the prompt and 8 ids: only a difference within them can be judged."""
    torch.manual_seed(0)
    length = len(encode_prompt(tokenizer, Prompt("p", ASKED), "plain", 100))
    model = RewardModel(llama(vocab_size=300, max_seq_len=length + 8), "sequence")
    long = " ".join([RIGHT] * 4)
    system, reference = (outputs(long + " a", "No.", long, long),
                         outputs(long + " b", "No.", long, "It"))
    found = by_reward(model, tokenizer, Encoding("plain"), system, reference)
    assert found[:3] == [None, 0.5, 0.5] and found[3] in (0, 1)
    assert (f"5 of 8 answers do not fit the reward model's context of {length + 8} tokens"
            in capsys.readouterr().err)


def test_by_reward_says_how_many_prompts_lost_their_beginning(tokenizer, capsys):
    """Both answers to a prompt see the same cut prompt, which counts once."""
    model = RewardModel(llama(vocab_size=300, max_seq_len=160), "sequence")
    ours = [*outputs(RIGHT, "No."), Output("It", "is", "m")]
    theirs = [*outputs("No.", "It"), Output("It", "is", "m")]
    by_reward(model, tokenizer, Encoding("plain", 8), ours, theirs)
    assert "1 of 2 prompts lost their beginning, because the reward model was trained with " \
        "--prompt-tokens 8\n" in capsys.readouterr().err
    by_reward(model, tokenizer, Encoding("plain", 100), ours, theirs)
    assert "lost" not in capsys.readouterr().err


def test_by_reward_calls_a_constant_model_constant_and_stops_at_nan(tokenizer, capsys):
    model = RewardModel(llama(vocab_size=300, max_seq_len=160), "sequence")
    torch.nn.init.zeros_(model.head.weight)
    assert by_reward(model, tokenizer, Encoding("plain"), outputs(RIGHT), outputs("No.")) == [0.5]
    assert "the reward model is constant" in capsys.readouterr().err
    by_reward(model, tokenizer, Encoding("plain"), outputs(RIGHT), outputs(RIGHT))
    assert "constant" not in capsys.readouterr().err
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="expected finite numbers, got nan"):
        by_reward(model, tokenizer, Encoding("plain"), outputs(RIGHT), outputs("No."))


def test_by_reward_shows_the_input_and_the_passages_that_the_policy_saw(tokenizer):
    """`answers` keeps them in its outputs; each template shows its own part."""
    policy = llama(vocab_size=300, max_seq_len=320)
    model, asked = RewardModel(policy, "sequence"), []
    model.sequence_rewards = lambda sequences: (
        asked.append(sequences.tokens[0, :sequences.prompt_lengths[0]].tolist()),
        torch.zeros(1))[1]
    prompt = Prompt("p", ASKED, "It is", (Passage("Title", "Text."),), "koala")
    for template in ("plain", "qa", "alpaca"):
        found = answers(policy, tokenizer, [prompt], template, 4, 0.0, 0)
        asked.clear()
        by_reward(model, tokenizer, Encoding(template), found, found)
        # The two answers are equal, so one pass judges both.
        assert asked == [encode_prompt(tokenizer, prompt, template, 316)]
    assert dict(found[0].other) == {"input": '"It is"',
                                    "context": '[{"title": "Title", "text": "Text."}]',
                                    "dataset": '"koala"'}


def test_answers_end_at_the_templates_end_of_a_turn(tokenizer, monkeypatch):
    policy, prompts = llama(vocab_size=300, max_seq_len=160), [Prompt("p", ASKED)]
    whole = answers(policy, tokenizer, prompts, "{prompt} ->", 8, 0.0, 0)[0].output
    ids = tokenizer.encode(whole)
    monkeypatch.setattr(tokenizer, "control", {"<|im_end|>": ids[-1]}, raising=False)
    found = answers(policy, tokenizer, prompts, "{prompt} ->{response}<|im_end|>", 8, 0.0, 0)
    assert whole.startswith(found[0].output) and len(found[0].output) < len(whole)


def test_answers_come_in_the_order_of_the_prompts_whatever_the_batch(tokenizer):
    """Greedy answers do not depend on who shares the batch; prompts are sorted by length inside."""
    policy = llama(vocab_size=300, max_seq_len=160)
    prompts = [Prompt(str(i), ASKED * (1 + i % 3) + " x" * i) for i in range(5)]
    found = {batch: answers(policy, tokenizer, prompts, "plain", 12, 0.0, 0, "me", batch)
             for batch in (1, 2, 5)}
    assert found[1] == found[2] == found[5]
    assert [o.instruction for o in found[1]] == [p.prompt for p in prompts]
    assert {o.generator for o in found[1]} == {"me"} and len({o.output for o in found[1]}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_of_a_model_that_overflows_stop(temperature, tokenizer):
    """Every weight is finite, but the hidden states are not: otherwise the answers are noise."""
    policy = llama(vocab_size=300, max_seq_len=160)
    for matrix in (policy.layers[0].feed_forward.w1, policy.layers[0].feed_forward.w3):
        matrix.weight.data.mul_(1e25)
    with pytest.raises(FloatingPointError, match="log-probabilities of the answers"):
        answers(policy, tokenizer, [Prompt("a", ASKED)], "plain", 4, temperature, 0)


def test_answers_are_a_function_of_seed_and_purpose(tokenizer):
    """Dev answers of a run with seed 3 must share no draws with the reference sampled by seed 3."""
    policy, prompts = llama(vocab_size=300, max_seq_len=160), [Prompt("a", ASKED)] * 3
    first, again, other, dev = (
        answers(policy, tokenizer, prompts, "plain", 12, 1.0, seed, purpose=purpose)
        for seed, purpose in ((0, "answers"), (0, "answers"), (1, "answers"), (0, "dev")))
    assert first == again != other
    assert first != dev


# A language model.

class Judge:
    """Replaces Client: answers by a function of the two texts shown, one after another."""
    model, stopped_by = "m", ""

    def __init__(self, decide):
        self.decide, self.asked = decide, []

    def ask(self, system, messages):
        text = messages[0]["content"]
        shown = [re.search(rf"<{name}>\n(.*)\n</{name}>", text, re.DOTALL)[1]
                 for name in ("first", "second")]
        self.asked.append(text)
        return Reply(self.decide(*shown), True)

    def gather(self, items, call):
        for item in items:
            try:
                yield item, call(item)
            except Unanswered as error:
                yield item, error


def better(text: str) -> str:
    return json.dumps({"better": text})


def judged(decide, ours="ours", theirs="theirs"):
    judge = Judge(decide)
    [annotation] = by_llm(judge, outputs(ours), outputs(theirs))
    return annotation, judge


@pytest.mark.parametrize("decide, preference, winner", [
    (lambda a, b: better("second" if b == "ours" else "first"), 2, 2),
    (lambda a, b: better("first" if b == "ours" else "second"), 1, 1),
    (lambda a, b: better("first"), 1.5, None),             # favours a place: contradiction
    (lambda a, b: better("tie"), 1.5, None),
    (lambda a, b: better("second" if b == "ours" else "tie"), 1.75, 2),
    (lambda a, b: better("first" if b == "ours" else "tie"), 1.25, 1)])
def test_by_llm_asks_in_both_orders_and_takes_the_mean(decide, preference, winner):
    annotation, judge = judged(decide)
    assert len(judge.asked) == 2
    assert (annotation.preference, annotation.winner) == (preference, winner)
    assert (annotation.output_1, annotation.output_2) == ("theirs", "ours")
    assert preferences_of([annotation]) == [preference - 1]


def test_by_llm_calls_equal_answers_a_tie_without_a_question():
    annotation, judge = judged(None, "same", "same")
    assert annotation.preference == 1.5 and judge.asked == []


@pytest.mark.parametrize("said", ["ours is better", better("third"), better(["first"]), "{}"])
def test_by_llm_leaves_a_pair_undecided_after_two_unusable_answers_in_an_order(said):
    annotation, judge = judged(lambda a, b: said)
    assert len(judge.asked) == 4
    assert annotation == Annotation(ASKED, "theirs", "ours", None, "m", "m", "m")
    assert preferences_of([annotation]) == [None]


def test_by_llm_shows_instruction_input_and_answers_and_keeps_their_order():
    system = [Output("Say", f"s{i}", "me", other=(("input", '"with this"'),)) for i in range(3)]
    reference = [replace(o, output=f"r{i}", generator="ref") for i, o in enumerate(system)]
    judge = Judge(lambda a, b: better("first"))
    found = by_llm(judge, system, reference)
    assert judge.asked[0] == ("<instruction>\nSay\n</instruction>\n\n<input>\nwith this\n</input>"
                              "\n\n<first>\nr0\n</first>\n\n<second>\ns0\n</second>")
    assert [a.output_2 for a in found] == ["s0", "s1", "s2"]
    assert (found[0].generator_1, found[0].generator_2, found[0].annotator) == ("ref", "me", "m")
    assert found[0].input == "with this"


@pytest.mark.parametrize("of_system, of_reference", [(True, True), (True, False), (False, True)])
def test_by_llm_shows_the_passages_of_either_file(of_system, of_reference):
    """The same question and answers over two passages are two questions: no verdict is shared."""
    passages = [[{"title": "Mat", "text": f"The {animal} sat."}]
                for animal in ("cat", "dog")]
    system, reference = (
        [Output("Who sat?", said, "m", other=(("context", json.dumps(p)),) if has else ())
         for p in passages] for said, has in (("ours", of_system), ("theirs", of_reference)))
    judge = Judge(lambda a, b: better("first"))
    by_llm(judge, system, reference)
    assert judge.asked[0] == (
        '<instruction>\nWho sat?\n</instruction>\n\n<passage title="Mat">\nThe cat sat.\n</passage>'
        "\n\n<first>\ntheirs\n</first>\n\n<second>\nours\n</second>")
    assert len(set(judge.asked)) == 4


def test_by_llm_gives_no_judgements_if_a_question_stays_unanswered():
    def decide(a, b):
        raise Unanswered("HTTP 500")
    with pytest.raises(UserError, match=r"all 1 pairs, got none on 1 \(HTTP 500\)"):
        by_llm(Judge(decide), outputs("a"), outputs("b"))


# ----- eval.py outputs and reward-model -----------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """A policy of context 64, a constant reward model, a prompt and an edit."""
    folder = tmp_path_factory.mktemp("eval")
    policy = llama(vocab_size=300, max_seq_len=64)
    save_model(policy, folder / "policy", tokenizer=tokenizer)
    model = RewardModel(policy, "token")
    torch.nn.init.zeros_(model.head.weight)
    save_reward(model, folder / "reward", tokenizer)
    records.write_jsonl(folder / "prompts.jsonl", [Prompt("a", "Name it.")])
    records.write_jsonl(folder / "edits.jsonl", [Edit("a", "Name it.", "It was.", "It is.",
                                                      spans=(Span(3, 6, "fact"),))])
    return folder


def evaluated(command: str, config: type, *flags) -> dict:
    return getattr(evaluation, command)(parse(config, argv=[*map(str, flags)]))


def test_outputs_asks_for_no_more_tokens_than_the_context_holds(folder):
    """BOS and one token of a prompt leave 62 of 64; a prompt that needs more is named."""
    flags = ("--policy", folder / "policy", "--prompts", folder / "prompts.jsonl", "--out",
             folder / "out.json", "--max-new-tokens")
    for asked, said in ((63, "--max-new-tokens 63: expected at most 62, .* context of .*policy, 64 "
                             "tokens"),
                        (62, "prompts.jsonl: record 'a': prompt: expected at most 2 tokens, got .*"
                             "; lower --max-new-tokens, which takes 62 of the model's context of 64"
                             ", or shorten the prompt; --on-bad-record skip leaves it out$")):
        with pytest.raises(UserError, match=said):
            evaluated("outputs", evaluation.OutputsConfig, *flags, asked)
        assert not (folder / "out.json").exists()
    assert evaluated("outputs", evaluation.OutputsConfig, *flags, 8)["outputs"] == 1
    assert [o.instruction for o in read_outputs(folder / "out.json")] == ["Name it."]


def test_outputs_says_that_the_template_shows_no_passages(folder, capsys):
    records.write_jsonl(folder / "passages.jsonl", [Prompt("a", "Name it.",
                                                           context=(Passage("T", "x"),))])
    evaluated("outputs", evaluation.OutputsConfig, "--policy", folder / "policy", "--prompts",
              folder / "passages.jsonl", "--out", folder / "out.json", "--max-new-tokens", 2)
    assert ("passages.jsonl: 1 records have passages (context) that the template plain does not "
            "show; --template qa does\n") in capsys.readouterr().err


def test_outputs_writes_every_temperature_and_the_best_of_n(folder, monkeypatch):
    """Each file is what a command with that temperature writes."""
    flags = ("--policy", folder / "policy", "--prompts", folder / "prompts.jsonl",
             "--max-new-tokens", 8, "--out")
    ask = lambda *more: evaluated("outputs", evaluation.OutputsConfig, *flags, *more)
    ask(folder / "t.json", "--temperatures", "0.7, 3")
    ask(folder / "alone.json", "--temperature", 0.7)
    assert (folder / "t-0.7.json").read_bytes() == (folder / "alone.json").read_bytes()
    assert (folder / "t-3.json").exists()
    ask(folder / "best.json", "--best-of", 3, "--reward", folder / "reward")
    assert len(read_outputs(folder / "best.json")) == 1
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "answers", None)          # refused before anything is sampled
        with pytest.raises(UserError, match="policy: expected a reward model folder"):
            ask(folder / "no.json", "--best-of", 2, "--reward", folder / "policy")
    for wrong in (("--temperatures", "0.7,hot"), ("--best-of", 2), ("--reward", folder / "reward"),
                  ("--best-of", 4, "--reward", folder / "reward", "--temperature", 0)):
        with pytest.raises(UserError, match=f"{wrong[0]}.*: expected"):
            ask(folder / "no.json", *wrong)


@pytest.mark.parametrize("out, more, said", [
    ("o.json", ("--greedy-out", "policy/../o.json"), "--greedy-out .* the path of --out;"),
    ("o.json", ("--greedy-out", "o-0.7.json", "--temperatures", "0.7"),
     "--temperatures .*o-0.7.json: .* the path of --greedy-out;"),
    ("o.json", ("--temperatures", "0.7,0.5,0.7"), "o-0.7.json: .* the path of --temperatures;"),
    ("prompts.jsonl", (), "--out .* the path of --prompts;"),
    ("o.json", ("--greedy-out", "policy/params.json"), "--greedy-out .* a path inside --policy "),
    ("o.json", ("--greedy-out", "reward/reward.json"), "--greedy-out .* a path inside --reward "),
    ("policy/../policy/deep/new.json", (), "--out .* a path inside --policy "),
    (".", ("--temperatures", "1"), "--out .: .* a folder; choose the path of a file")])
def test_outputs_refuses_files_that_are_not_its_own(out, more, said, folder, monkeypatch):
    """Two kinds of answers have two files, and no input is written over, before any work."""
    monkeypatch.setattr(evaluation, "load_model", None)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=said) as refusal:
        evaluated("outputs", evaluation.OutputsConfig, "--policy", "policy", "--prompts",
                  folder / "prompts.jsonl", "--reward", "reward", "--best-of", 2, "--out", out,
                  *more)
    assert ": expected a file of its own, got " in str(refusal.value)


@pytest.mark.parametrize("name, content", [
    ("edits.jsonl", '{"id": "e1", "prompt": "p", "original": "a b", "edited": "a c"}\n'),
    ("shown.json", '[{"instruction": "p", "input": "", "output": "a"}]\n'),
    ("notes.txt", "what the annotators said\n")])
def test_outputs_writes_over_answers_only(name, content, folder, tmp_path, monkeypatch):
    """A file of another kind stays as it is. Answers are written over, and so is an empty file."""
    monkeypatch.setattr(evaluation, "load_model", None)
    (tmp_path / name).write_text(content)
    ask = lambda out: evaluated("outputs", evaluation.OutputsConfig, "--policy", folder / "policy",
                                "--prompts", folder / "prompts.jsonl", "--out", out)
    begin = re.escape(content[:9])
    with pytest.raises(UserError, match=f"--out .*{name}: expected a new file or a file of answers "
                       f"to write over, got a file that begins with .*{begin}.*; choose "):
        ask(tmp_path / name)
    assert (tmp_path / name).read_text() == content
    records.write_outputs(tmp_path / "a.json", [Output("p", "a", "one")])
    (tmp_path / "empty.json").touch()
    for out in ("a.json", "empty.json", "new.json"):
        with pytest.raises(TypeError):                  # it goes on to load_model
            ask(tmp_path / out)


def test_a_language_models_judgements_do_not_replace_another_file(tmp_path):
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"id": "e1", "prompt": "p", "original": "a b", "edited": "a c"}\n')
    with pytest.raises(UserError, match="--judgements .*expected a new file or judgements to wri"):
        evaluated("win_rate", evaluation.WinRateConfig, "--judge", "llm", "--model", "m",
                  "--outputs", "a.json", "--reference", "b.json", "--judgements", edits)


def test_outputs_refuses_a_file_that_cannot_be_written_before_any_work(folder, monkeypatch):
    """A file is in the place of a folder (root could write anywhere else)."""
    monkeypatch.setattr(evaluation, "load_model", None)
    for flag, other in (("--out", ()), ("--greedy-out", ("--out", folder / "o.json"))):
        with pytest.raises(UserError, match=f"{flag} .*/x.json: cannot be written .*edits.jsonl is "
                                            "no folder in which you may write"):
            evaluated("outputs", evaluation.OutputsConfig, "--policy", folder / "policy",
                      "--prompts", folder / "prompts.jsonl", *other,
                      flag, folder / "edits.jsonl/x.json")


def test_outputs_says_how_many_answers_are_cut(folder, tokenizer, monkeypatch, capsys):
    """Of two answers one has an EOS. An answer also ends where a turn of the template ends."""
    records.write_jsonl(folder / "two.jsonl", [Prompt("a", "Name it."), Prompt("b", "Name it.")])
    ended, end = [*tokenizer.encode("It is", eos=True)], tokenizer.encode("No.")[-1]
    whole = tokenizer.encode("It was")
    assert end not in whole

    def sample(policy, prompts, *rest):
        return Rollout(pack(prompts, [ended, whole][:len(prompts)]), torch.zeros(1),
                       torch.tensor([False, True]))
    monkeypatch.setattr("fgrlhf.judge.sample", sample)
    ask = lambda *more: evaluated("outputs", evaluation.OutputsConfig, "--policy",
                                  folder / "policy", "--prompts", folder / "two.jsonl", "--out",
                                  folder / "cut.json", "--max-new-tokens", 8, *more)
    said = "{} answers are cut at --max-new-tokens 8, before they end\n".format
    assert ask()["outputs"] == 2 and capsys.readouterr().err == said("1 of 2")
    ask("--temperatures", "0.7", "--greedy-out", folder / "cut-greedy.json")
    assert capsys.readouterr().err == said("3 of 6")
    ask("--best-of", 3, "--reward", folder / "reward")
    assert capsys.readouterr().err.endswith(said("3 of 6"))
    whole.append(end)
    monkeypatch.setattr("fgrlhf.judge.end_of_turn", lambda *_: end)
    assert ask()["outputs"] == 2 and capsys.readouterr().err == ""
    whole[:] = [end]
    ask()
    assert capsys.readouterr().err == f"1 of 2 answers of {folder / 'cut.json'} are empty\n"


def test_reward_model_calls_a_constant_model_constant(folder, capsys):
    table = evaluated("reward_model", evaluation.RewardModelConfig, "--reward", folder / "reward",
                      "--data", folder / "edits.jsonl")
    assert table["pair_accuracy"] == table["token_auc"] == 0.5
    assert "reward: the reward model is constant: it gives every token" in capsys.readouterr().err


# ----- token scores from a file -------------------------------------------------------------------

EDITS = [Edit("a", "Name it.", "It was.", "It is.", spans=(Span(3, 6, "fact"),)),
         Edit("b", "Name it.", "No.", "It is the river."), Edit("7", "Name one.", "It is.", "Its.")]


def scores_file(folder: Path, lines: list[dict]) -> Path:
    path = folder / "scores.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def scored(folder: Path, lines: list[dict], data: str = "scored.jsonl") -> dict:
    """What `eval.py reward-model --scores` prints for EDITS."""
    records.write_jsonl(folder / "scored.jsonl", EDITS)
    return evaluated("reward_model", evaluation.RewardModelConfig, "--scores",
                     scores_file(folder, lines), "--tokenizer", folder / "policy", "--data",
                     folder / data)


def test_scores_of_a_file_are_judged_by_their_mean(folder, tokenizer):
    """Means 1 > 0, 1 < 2 and a tie. In the span of record a the lowest score is the last."""
    ids = lambda text: tokenizer.encode(text, eos=True)
    inside = [max(3, start) < min(6, end) for start, end in tokenizer.offsets("It was.")]
    assert any(inside) and not all(inside)
    worse = [-1.0 if wrong else 1.0 for wrong in inside]
    lines = [{"id": 7, "chosen": [3] * len(ids("Its.")), "rejected": [3] * len(ids("It is."))},
             {"id": "b", "chosen": [1.0] * len(ids("It is the river.")),
              "rejected": [2.0] * len(ids("No."))},
             {"id": "a", "chosen": [1.0] * len(ids("It is.")),
              "rejected": [*worse, -sum(worse)]}]                   # EOS makes the mean 0
    table = scored(folder, lines)
    assert table["pairs"] == 3 and table["pair_accuracy"] == 0.5
    sums = [(len(ids("It is.")), 0), (len(ids("It is the river.")), 2 * len(ids("No."))),
            (3 * len(ids("Its.")), 3 * len(ids("It is.")))]
    assert table["pair_accuracy_sum"] == pytest.approx(
        sum((a > b) + 0.5 * (a == b) for a, b in sums) / 3)
    assert table["token_auc"] == table["token_auc_within"] == 1.0


def test_scores_of_no_record_are_counted(folder, tokenizer, capsys):
    line = lambda edit, id: {"id": id, **{side: [0.5] * len(tokenizer.encode(text, eos=True))
                                          for side, text in (("chosen", edit.edited),
                                                             ("rejected", edit.original))}}
    lines = [line(edit, edit.id) for edit in EDITS]
    said = "ids are not those of a judged record"
    scored(folder, lines)
    assert said not in capsys.readouterr().err
    scored(folder, [*lines, line(EDITS[0], "typo"), line(EDITS[0], "x")])
    assert (f"{folder}/scores.jsonl: 2 of 5 {said}, such as 'typo'; their scores are not used\n"
            in capsys.readouterr().err)


def test_scores_give_the_table_of_the_reward_model_that_made_them(folder, tokenizer):
    torch.manual_seed(3)
    model = RewardModel(llama(vocab_size=300, max_seq_len=64), "token", "mean")
    save_reward(model, folder / "made", tokenizer, Encoding("plain"))
    lines = []
    for edit in EDITS:                          # no token has the same reward in two of them
        prompt = tokenizer.encode(f"{edit.prompt} ->", bos=True)
        with torch.no_grad():
            chosen, rejected = (model.token_rewards(pack([prompt], [tokenizer.encode(
                text, eos=True)]))[0].tolist() for text in (edit.edited, edit.original))
        lines.append({"id": edit.id, "chosen": chosen, "rejected": rejected})
    table = evaluated("reward_model", evaluation.RewardModelConfig, "--reward", folder / "made",
                      "--data", folder / "scored.jsonl")
    assert scored(folder, lines) == pytest.approx(table, rel=1e-6) and "edit_auc" in table


@pytest.mark.parametrize("change, said", [
    ({"id": "x"}, "scores.jsonl: expected the scores of record 'b', found none; add a line"),
    ({"rejected": [1.0]}, r"scores.jsonl:2: rejected: expected \d+ numbers, one for each token of "
                          "the response, EOS included, got 1"),
    ({"chosen": ["1"]}, r"scores.jsonl:2: chosen\[0\]: expected a number, got '1'"),
    ({"id": "a"}, "scores.jsonl:2: id: expected a new id, got 'a' as in .*scores.jsonl:1"),
    ({"reward": 1.0}, "scores.jsonl:2: 'reward': unknown field")])
def test_scores_that_do_not_fit_are_refused_by_line(change, said, folder, tokenizer):
    line = lambda edit: {"id": edit.id, **{side: [0.5] * len(tokenizer.encode(text, eos=True))
                                           for side, text in (("chosen", edit.edited),
                                                              ("rejected", edit.original))}}
    lines = [line(edit) for edit in EDITS]
    lines[1] |= change
    with pytest.raises(UserError, match=said):
        scored(folder, lines)


@pytest.mark.parametrize("flags, said", [
    ((), "expected exactly one of --reward DIR and --scores FILE"),
    (("--scores", "s"), "--scores and --tokenizer: expected both or neither"),
    (("--reward", "r", "--tokenizer", "t"), "--scores and --tokenizer: expected both or neither")])
def test_reward_model_takes_a_model_or_scores_with_their_tokenizer(flags, said):
    with pytest.raises(UserError, match=said):
        evaluated("reward_model", evaluation.RewardModelConfig, "--data", "d", *flags)
