"""Judges: who wins by hand-made answers; answers come back in the order of their prompts."""

import json
import re

import pytest
import torch

from fgrlhf.collect.client import Unanswered
from fgrlhf.collect.judge import by_llm
from fgrlhf.collect.protocol import Reply
from fgrlhf.data import records
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Output, Prompt
from fgrlhf.encode import encode_prompt
from fgrlhf.judge import answers, by_annotations, by_reward, check_same_prompts, preferences_of
from fgrlhf.reward import RewardModel
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


def test_same_prompts_refuses_another_order():
    first, second = Output("a", "", "m"), Output("b", "", "m")
    check_same_prompts([first, second], [first, second])
    with pytest.raises(UserError, match="same order"):
        check_same_prompts([first, second], [second, first])


def test_by_annotations_gives_the_second_outputs_share(tmp_path):
    (tmp_path / "a.json").write_text("[" + ",".join(
        f'{{"instruction": "{i}", "output_1": "x", "output_2": "y", "preference": {p}}}'
        for i, p in enumerate(("1", "2", "1.5", "null", "1.2"))) + "]")
    assert by_annotations(str(tmp_path / "a.json")) == [0, 1, 0.5, 0.5, 0]


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
    assert by_reward(model, tokenizer, "plain", outputs(*texts), outputs(*others)) == expected
    assert 0 < sum(expected) < 4
    assert by_reward(model, tokenizer, "plain", outputs(RIGHT), outputs(RIGHT)) == [0.5]


def test_answers_come_in_the_order_of_the_prompts_whatever_the_batch(tokenizer):
    """Greedy answers do not depend on who shares the batch; prompts are sorted by length inside."""
    policy = llama(vocab_size=300, max_seq_len=160)
    prompts = [Prompt(str(i), ASKED * (1 + i % 3) + " x" * i) for i in range(5)]
    found = {batch: answers(policy, tokenizer, prompts, "plain", 12, 0.0, 0, "me", batch)
             for batch in (1, 2, 5)}
    assert found[1] == found[2] == found[5]
    assert [o.instruction for o in found[1]] == [p.prompt for p in prompts]
    assert {o.generator for o in found[1]} == {"me"} and len({o.output for o in found[1]}) > 1


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
    assert preferences_of([annotation]) == [{1: 0, None: 0.5, 2: 1}[winner]]


def test_by_llm_calls_equal_answers_a_tie_without_a_question():
    annotation, judge = judged(None, "same", "same")
    assert annotation.preference == 1.5 and judge.asked == []


@pytest.mark.parametrize("said", ["ours is better", better("third"), better(["first"]), "{}"])
def test_by_llm_leaves_a_pair_undecided_after_two_unusable_answers_in_an_order(said):
    annotation, judge = judged(lambda a, b: said)
    assert annotation is None and len(judge.asked) == 4


def test_by_llm_shows_instruction_input_and_answers_and_keeps_their_order():
    system = [Output("Say", f"s{i}", "me", other=(("input", '"with this"'),)) for i in range(3)]
    reference = [Output("Say", f"r{i}", "ref") for i in range(3)]
    judge = Judge(lambda a, b: better("first"))
    found = by_llm(judge, system, reference)
    assert judge.asked[0] == ("<instruction>\nSay\n</instruction>\n\n<input>\nwith this\n</input>"
                              "\n\n<first>\nr0\n</first>\n\n<second>\ns0\n</second>")
    assert [a.output_2 for a in found] == ["s0", "s1", "s2"]
    assert (found[0].generator_1, found[0].generator_2, found[0].annotator) == ("ref", "me", "m")
    assert found[0].input == "with this"


def test_by_llm_gives_no_judgements_if_a_question_stays_unanswered():
    def decide(a, b):
        raise Unanswered("HTTP 500")
    with pytest.raises(UserError, match=r"all 1 pairs, got none on 1 \(HTTP 500\)"):
        by_llm(Judge(decide), outputs("a"), outputs("b"))
