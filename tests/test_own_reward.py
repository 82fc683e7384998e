"""--reward module:function: what reaches the update, and what is said about a wrong function."""

import json
import re
import sys

import pytest
import torch

import train_ppo
from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.checks import __main__ as checks, startup
from fgrlhf.data.fields import UserError
from fgrlhf.engine import lora, players
from fgrlhf.engine.config import parse
from fgrlhf.own_reward import OwnReward, find, is_own, start_of_critic
from fgrlhf.sequences import pack
from tests.small import ppo_folder
from tests.test_readme import TEXTS, commands_of
from tests.test_readme_commands import SMALLER
from tests.test_train_ppo import config, updates


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ppo_folder(tmp_path_factory.mktemp("ppo"))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes my_rewards.py into the current directory, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def write(text: str) -> None:
        (tmp_path / "my_rewards.py").write_text(text)
        monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield write
    sys.modules.pop("my_rewards", None)


PLANTED = """
def planted(prompts, ids):
    return [[len(p) + t + id / 1000 for t, id in enumerate(row)] for p, row in zip(prompts, ids)]

def spread(responses):
    return [len(text) / 7 for text in responses]

def constant(responses, **others):
    return [3] * len(responses)
"""


# ----- what reaches the update --------------------------------------------------------------------

def test_numbers_per_token_are_the_rewards_of_their_tokens(folder, tmp_path, write, monkeypatch):
    """Microbatches of 2 of 6 responses, sorted by length: the numbers find their rows again."""
    write(PLANTED)
    tokenizer = load_tokenizer(folder / "policy")
    for batch in updates(monkeypatch, config(folder, out="a", reward="my_rewards:planted",
                                             standardise="none", beta=0.0, rollouts=12)):
        for b, (p, n) in enumerate(zip(*(part.tolist() for part in batch.sequences[1:]))):
            row = batch.sequences.tokens[b].tolist()
            expected = [len(tokenizer.decode(row[:p])) + t + row[p + t] / 1000 for t in range(n)]
            assert batch.rewards[b, :n].tolist() == pytest.approx(expected)
            assert batch.advantages[b, :n].tolist() == pytest.approx(expected)
            assert not batch.rewards[b, n:].any()
    inputs = json.loads((tmp_path / "a/done.json").read_text())["inputs"]
    assert {"policy", "prompts", "tokenizer", "my_rewards.py"} == set(inputs)


@pytest.mark.parametrize("flags", [{"method": "rlhf"}, {"method": "rloo", "group": 3}])
def test_a_number_per_response_is_the_reward_of_its_last_token(flags, folder, write, monkeypatch):
    write(PLANTED)
    tokenizer = load_tokenizer(folder / "policy")
    seen = updates(monkeypatch, config(folder, out="a", reward="my_rewards:spread",
                                       **flags))
    assert len(seen) == 2
    for batch in seen:
        for b, (p, n) in enumerate(zip(*(part.tolist() for part in batch.sequences[1:]))):
            text = tokenizer.decode(batch.sequences.tokens[b, p:p + n].tolist())
            expected = [0.0] * (batch.mask.shape[1] - 1)
            expected.insert(n - 1, len(text) / 7)
            assert batch.rewards[b].tolist() == pytest.approx(expected)


def test_the_function_gets_texts_that_join_and_only_what_it_names(folder, write):
    write("seen = []\n"
          "def f(tokens, responses, ids, prompts, scale=2):\n"
          "    seen.append((prompts, responses, ids, tokens))\n"
          "    ids[0].pop()\n"
          "    return [scale] * len(responses)\n")
    tokenizer = load_tokenizer(folder / "policy")
    first, second = tokenizer.encode("it is é", eos=True), tokenizer.encode("red")
    batch = pack([tokenizer.encode("name ->", bos=True)] * 2, [first, second])
    rewards = OwnReward(find("my_rewards:f"), "rlhf", tokenizer).ppo_rewards(batch)
    expected = torch.zeros(2, len(first))
    expected[0, len(first) - 1] = expected[1, len(second) - 1] = 2
    assert torch.equal(rewards, expected)
    (prompts, responses, ids, tokens), = sys.modules["my_rewards"].seen
    assert prompts == ["name ->"] * 2 and responses == ["it is é", "red"]
    assert ids == [first[:-1], second]                              # it took one out itself
    assert ["".join(row) for row in tokens] == responses
    assert tokens[0][-1] == "" and len(tokens[0]) == len(first)


def test_arrays_tensors_tuples_and_booleans_are_numbers_too(folder, write):
    write("import numpy, torch\n"
          "def f(responses):\n"
          "    return numpy.array([1.5, 2], dtype='float32')\n"
          "def g(ids):\n"
          "    return (torch.tensor([1, 2]), [True, numpy.float32(0.5)])\n")
    tokenizer = load_tokenizer(folder / "policy")
    batch = pack([[1, 5]] * 2, [[7, 8], [9, 2]])
    for name, method, expected in (("f", "grpo", [[0, 1.5], [0, 2]]),
                                   ("g", "fine-grained", [[1, 2], [1, 0.5]])):
        model = OwnReward(find(f"my_rewards:{name}"), method, tokenizer)
        assert model.ppo_rewards(batch).tolist() == expected


def test_the_critic_starts_from_the_policy_with_a_head_drawn_by_the_seed(folder, write):
    write(PLANTED)
    policy = load_model(folder / "policy")
    heads = [start_of_critic(policy, seed).head.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(17 ** -0.5, rel=0.5)
    loaded = players.load(config(folder, method="rlhf", reward="my_rewards:spread"),
                          torch.device("cpu"))
    assert torch.equal(loaded.critic.head.weight, heads[0])
    for name, weight in policy.state_dict().items():
        assert torch.equal(loaded.critic.trunk.state_dict()[name], weight)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(
        loaded.critic.trunk.parameters(), loaded.policy.parameters()))


def test_with_adapters_the_critic_shares_the_trunk_of_the_policy(folder, write):
    write(PLANTED)
    loaded = players.load(config(folder, method="rlhf", reward="my_rewards:spread", lora_rank=2),
                          torch.device("cpu"))
    ours, theirs = (lora.shared(model) for model in (loaded.critic.trunk, loaded.policy))
    assert ours and all(ours[name] is theirs[name] for name in theirs)
    trained = {name for name, p in loaded.critic.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trained
    assert all("lora_" in name for name in trained if name.startswith("trunk."))


# ----- what is wrong with a function --------------------------------------------------------------

@pytest.mark.parametrize("method, body, said", [
    ("rlhf", "return [0.5]", "expected a list of 2 rewards, one for each response, got 1 of them"),
    ("rlhf", "pass", "expected a list of 2 rewards, one for each response, got None"),
    ("rlhf", "return [1, [2, 3]]", "response 'red': expected one number for --method rlhf, got "
                                   r"\[2, 3\]; .*another --method"),
    ("fine-grained", "return [1, 2]", "response 'is': expected a list of numbers, one for each "
                                      "token, for --method fine-grained, got 1;"),
    ("fine-grained", "return [[0] * len(i) for i in ids[:1]] + [[1]]",
     r"response 'red': expected \d numbers, one for each token \(EOS included\), got 1;"),
    ("fine-grained", "return [[0] * (len(i) - 1) + [float('nan')] for i in ids]",
     r"response 'is': reward of token \d: expected a finite number, got nan;"),
    ("rlhf", "return [1, 1e39]", "response 'red': reward: expected a finite number, got 1e"),
    ("rlhf", "return [1, 10 ** 400]", "response 'red': reward: expected a finite number, got 1000"),
    ("rlhf", "return [1, None]", "response 'red': reward: expected a finite number, got None"),
    ("rlhf", "return [1 / (text != 'red') for text in responses]",
     r"response 'red': the function failed: ZeroDivisionError: division by zero "
     r"\(.*my_rewards.py, line 2\); correct it"),
    ("rlhf", "return responses.index", "got <built-in method"),
    ("rlhf", "assert len(ids) == 1; return [1]",
     r"the function failed: AssertionError \(.*my_rewards.py, line 2\)")])
def test_what_a_function_returns_wrongly_is_named_with_its_response(method, body, said, folder,
                                                                    write):
    write(f"def f(responses, ids):\n    {body}\n")
    tokenizer = load_tokenizer(folder / "policy")
    batch = pack([[1, 5]] * 2, [tokenizer.encode(text, eos=True) for text in ("is", "red")])
    with pytest.raises(UserError, match=f"^--reward my_rewards:f: .*{said}") as error:
        OwnReward(find("my_rewards:f"), method, tokenizer).ppo_rewards(batch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reward, text, said", [
    ("my_rewards:f", "def g(ids): pass", r"expected a function f in .*my_rewards.py, got only "
                                         r"\['g'\]"),
    ("my_rewards:f", "f = 3", "expected a function f in .*my_rewards.py"),
    ("my_rewards:f", "def f(ids:\n    pass", r"my_rewards cannot be imported: SyntaxError: .*"
                                             r"\(.*my_rewards.py, line 1\); correct the file"),
    ("my_rewards:f", "\nimport no_such_package", "ModuleNotFoundError: No module named "
     r"'no_such_package' \(.*my_rewards.py, line 2\)"),
    ("my_rewards:f", "raise SystemExit(0)", r"SystemExit: 0 \(.*my_rewards.py, line 1\)"),
    ("my_rewards:f", "def f(texts): pass", "expected parameters with names among prompts, "
                                           "responses, ids, tokens, got texts;"),
    ("my_rewards:f", "def f(): pass", "got none;"),
    ("others:f", "", "expected others.py in .* or on Python's path, got no such file"),
    ("a/my_rewards.py:f", "", "expected module:function .*, got 'a/my_rewards.py'; give its name "
                              "without folder and .py")])
def test_a_function_that_is_not_there_is_named(reward, text, said, folder, tmp_path, write):
    write(text)
    with pytest.raises(UserError, match=f"^--reward {reward}: .*{said}") as error:
        train_ppo.train(config(folder, out="a", reward=reward))
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_a_folder_is_no_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_own("my_rewards:f") and not is_own("runs/rm/reward") and not is_own("runs:1/rm")
    (tmp_path / "my_rewards:f").mkdir()
    assert not is_own("my_rewards:f")


@pytest.mark.parametrize("text, name, said", [
    ("import random\ndef f(ids):\n    return [random.random() for _ in ids]", "rewards and values",
     "draw nothing"),
    ("def f(ids):\n    return [len(ids) for _ in ids]", "rewards and values",
     "depend on the response and its prompt only")])
def test_startup_checks_refuse_rewards_that_do_not_repeat(text, name, said, folder, tmp_path,
                                                          write):
    write(text)
    with pytest.raises(UserError, match=f"startup check failed: {name}: .*{said}"):
        train_ppo.train(config(folder, out="a", method="rlhf", reward="my_rewards:f"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("method, function", [("fine-grained", "planted"), ("rlhf", "spread")])
def test_every_startup_check_passes_on_a_sound_function(method, function, folder, write, capsys):
    write(PLANTED)
    checks.main(parse(checks.Config, "", [
        "--policy", str(folder / "policy"), "--reward", f"my_rewards:{function}", "--prompts",
        str(folder / "prompts.jsonl"), "--method", method, "--max-new-tokens", "12"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and all(line.startswith("pass") for line in lines)
    assert "in a call of its own differs by 0.0e+00" in lines[6]
    assert "nothing to learn" not in lines[6]
    with pytest.raises(UserError, match="--method: expected fine-grained or rlhf"):
        checks.main(checks.Config(policy="p", reward="my_rewards:planted", prompts="x"))


def test_a_constant_function_is_said_to_be_constant_and_runs(folder, write):
    write(PLANTED)
    loaded = players.load(config(folder, method="rlhf", reward="my_rewards:constant"),
                          torch.device("cpu"))
    found = dict(startup.run_all(startup.subject(config(folder), loaded)))
    assert all(check.passed for check in found.values())
    assert "every response has the reward 3, so" in found["rewards and values"].number


# ----- resuming -----------------------------------------------------------------------------------

def test_resume_needs_the_same_file_and_the_same_function(folder, tmp_path, write, monkeypatch):
    write(PLANTED)
    settings = dict(out="a", method="rlhf", reward="my_rewards:spread", iterations=3, save_every=1)
    update = train_ppo.update

    def stopped(config, players, batch, iteration):
        if iteration == 3:
            raise KeyboardInterrupt
        return update(config, players, batch, iteration)
    monkeypatch.setattr(train_ppo, "update", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_ppo.train(config(folder, **settings))
    monkeypatch.setattr(train_ppo, "update", update)

    resumed = settings | {"resume": True}
    write(PLANTED + "\n# another file\n")
    with pytest.raises(UserError, match=r"--resume needs the same my_rewards.py: its contents have "
                                        "changed since the run was started"):
        train_ppo.train(config(folder, **resumed))
    write(PLANTED)
    with pytest.raises(UserError, match="the same --reward: .*'my_rewards:spread', got "
                                        "'my_rewards:constant'"):
        train_ppo.train(config(folder, **resumed | {"reward": "my_rewards:constant"}))
    with pytest.raises(UserError, match="--resume needs the same --reward"):
        train_ppo.train(config(folder, **resumed | {"reward": str(folder / "sequence")}))
    train_ppo.train(config(folder, **resumed))
    train_ppo.train(config(folder, **settings | {"out": "b"}))
    assert len({(tmp_path / out / "metrics.jsonl").read_bytes() for out in "ab"}) == 1


# ----- the page -----------------------------------------------------------------------------------

def test_the_example_of_the_page_runs_as_it_is_written(folder, tmp_path, write):
    section = TEXTS["fgrlhf/engine/README.md"].split("## Your own reward")[1].split("\n## ")[0]
    write(re.search(r"```python\n(.*?)```", section, re.S)[1])
    paths = dict(re.findall(r"(MODEL|PROMPTS)=(\S+)", section))
    for name, file in (("MODEL", "policy"), ("PROMPTS", "prompts.jsonl")):
        (tmp_path / paths[name]).parent.mkdir(parents=True)
        (tmp_path / paths[name]).symlink_to(folder / file)
        section = section.replace(f"${name}", paths[name])
    outs = []
    for words in commands_of(section):
        smaller = parse(train_ppo.Config, "", words[2:] + SMALLER["train_ppo.py"])
        train_ppo.train(smaller)
        outs.append(smaller.out)
    assert len(outs) == 2 and all((tmp_path / out / "done.json").is_file() for out in outs)
    model = lambda name, method: OwnReward(find(f"my_rewards:{name}"), method,
                                           load_tokenizer(folder / "policy"))
    tokenizer = load_tokenizer(folder / "policy")
    batch = pack([[1, 5]], [tokenizer.encode("it is it is red")])
    assert model("brevity", "rlhf").ppo_rewards(batch)[0, -1].item() == pytest.approx(-0.5)
    batch = pack([[1, 5]], [[7, 8, 7, 7, 2]])
    assert model("no_repeats", "fine-grained").ppo_rewards(batch).tolist() == [[0, 0, -1, -1, 0]]
