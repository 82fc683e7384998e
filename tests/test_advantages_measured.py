"""Measured advantages, where every completion is known, and their comparison with estimates."""

import json

import numpy as np
import pytest
import torch

from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import parse
from fgrlhf.rollout import Rollout
from fgrlhf.sequences import pack
from fgrlhf.simulate import advantages
from fgrlhf.simulate.world import World
from fgrlhf.tokenizer import train
from tests.small import ppo_folder


def test_values_are_minus_the_mean_errors_of_the_completions(tmp_path, monkeypatch):
    """Half of the completions are right: V = -1/2 until the value is written, then exact."""
    world = World(3)
    land = world.lands[0]
    prompt, fact = f"Name the river of {land}.", world.facts[land, "river"]
    wrong = next(v for (_, a), v in world.facts.items() if a == "river" and v != fact)
    tokenizer = train([f"Its river is {value}." for value in (fact, wrong)] * 4, 290,
                      tmp_path / "t.model")
    text = f"Its river is {wrong}."
    response = tokenizer.encode(text, eos=True)
    head = next(t for t in range(len(response)) if tokenizer.decode(response[:t + 1]) !=
                f"Its river is {fact}."[:len(tokenizer.decode(response[:t + 1]))])

    def sample(policy, states, *rest):
        """Completes the sentence if it can be right, as right and wrong in turn."""
        rows = []
        for k, state in enumerate(states):
            so_far = state[1:]
            ends = [tokenizer.encode(f"Its river is {value}.", eos=True) for value in (fact, wrong)]
            fits = [end for end in ends if end[:len(so_far)] == so_far]
            rows.append(fits[k % len(fits)][len(so_far):])
        return Rollout(pack(states, rows), torch.zeros(1), torch.zeros(1))
    monkeypatch.setattr(advantages, "sample", sample)
    config = parse(advantages.Config, argv=["--world", "3", "--policy", "p", "--prompts", "q",
                                            "--rewards", "r", "--out", "o", "--completions", "4"])
    V = advantages.values_of(None, tokenizer, world, prompt, [1], response, config, None)
    cost = len(world.errors(prompt, text))
    assert V.shape == (len(response) + 1, 2) and cost == 1
    assert V[:head + 1].tolist() == [[-0.5, -0.5]] * (head + 1)
    assert V[head + 1:].tolist() == [[-1.0, -1.0]] * (len(response) - head)
    places = advantages.places_of(world, prompt, text, tokenizer, response)
    assert places[0] == "elsewhere" and "error" in places and places[-1] == "behind"


def test_flags_that_cannot_be_compared_are_refused_in_a_line(tmp_path):
    folder = ppo_folder(tmp_path)
    flags = ["--world", "3", "--policy", "p", "--prompts", "q", "--out", f"{tmp_path}/o"]
    for more, said in ((["--rewards", f"{folder}/sequence"], "expected a token-level reward model"),
                       (["--rewards", f"{folder}/token", "--critic", "c"], "both or neither")):
        with pytest.raises(UserError, match=said):
            advantages.main(parse(advantages.Config, argv=flags + more))


def test_an_out_that_is_an_input_or_a_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    folder = ppo_folder(tmp_path)
    monkeypatch.setattr(advantages, "load_model", None)
    for out, said in ((f"{folder}/prompts.jsonl", "got the path of --prompts"),
                      (f"{folder}/sequence/reward.json", "got a path inside --rewards .*sequence;"),
                      (f"{folder}/policy/new.json", "got a path inside --policy"),
                      (f"{folder}", "got a folder")):
        with pytest.raises(UserError, match=f"--out {out}: expected a file of its own, {said}"):
            advantages.main(parse(advantages.Config, argv=[
                "--world", "3", "--policy", f"{folder}/policy", "--prompts",
                f"{folder}/prompts.jsonl", "--out", out, "--rewards",
                f"{folder}/token,{folder}/sequence"]))


def test_compare_of_the_measurement_itself_is_perfect_and_of_its_negative_is_not():
    rng = np.random.default_rng(0)
    measured, places = rng.normal(size=300), np.array(advantages.PLACES * 100)
    same = advantages.compare(measured * 3 - 1, measured, places)
    assert same["correlation"] == same["correlation/error"] == pytest.approx(1)
    assert same["sign"] > 0.95
    assert advantages.compare(-measured, measured, places)["sign"] < 0.05
    json.dumps(same)
