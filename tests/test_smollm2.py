"""A real pretrained model from its GGUF file: an answer, a step of SFT, an iteration of PPO.

About a minute of one CPU core. Without the model the tests are skipped.
"""

import json

import pytest
import torch

import train_ppo
from fgrlhf import generate, sft
from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.data.records import Edit, write_jsonl
from fgrlhf.reward import RewardModel, save_reward
from tests.test_gguf import REAL

pytestmark = pytest.mark.skipif(not REAL.is_file(),
                                reason="needs SmolLM2-135M-Instruct; run `make model`")
EDITS = [Edit(str(n), f"What is the capital of {land}?", f"It is {wrong}.", f"It is {right}.")
         for n, (land, wrong, right) in enumerate([("France", "Lyon", "Paris"),
                                                   ("Japan", "Osaka", "Tokyo")])]


@pytest.fixture
def data(tmp_path) -> str:
    write_jsonl(tmp_path / "edits.jsonl", EDITS)
    return str(tmp_path / "edits.jsonl")


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def nats(model, tokenizer, edit: Edit) -> torch.Tensor:
    """-log p of each token of the edited text and of EOS, with the control tokens put by hand."""
    start, end = tokenizer.control["<|im_start|>"], tokenizer.control["<|im_end|>"]
    prompt = [start, *tokenizer.encode("user\n" + edit.prompt), end, *tokenizer.encode("\n"), start,
              *tokenizer.encode("assistant\n")]
    response = [*tokenizer.encode(edit.edited), end]
    with torch.no_grad():
        logp = model(torch.tensor([prompt + response]))[0].log_softmax(-1)
    return -torch.stack([logp[len(prompt) + t - 1, id] for t, id in enumerate(response)])


def test_it_answers_with_its_chat_template(capsys):
    generate.generate(generate.Config(model=str(REAL), template="chatml", prompt=EDITS[0].prompt,
                                  max_new_tokens=8, temperature=0.0))
    assert "Paris" in capsys.readouterr().out


def test_a_step_of_sft_has_the_loss_of_the_definition(data, tmp_path):
    sft.train(sft.Config(model=str(REAL), data=data, template="chatml", batch=2, lr=2e-5,
                         muon_lr=0.0, out=str(tmp_path / "sft")))
    model, tokenizer = load_model(REAL), load_tokenizer(REAL)
    expected = torch.cat([nats(model, tokenizer, edit) for edit in EDITS]).mean().item()
    assert metrics(tmp_path / "sft")["sft/loss"] == pytest.approx(expected, rel=1e-4)


def test_an_iteration_of_ppo_passes_every_startup_check(data, tmp_path):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(REAL)
    save_reward(RewardModel(load_model(REAL), "token"), tmp_path / "reward", tokenizer)
    train_ppo.train(train_ppo.Config(
        method="fine-grained", policy=str(REAL), reward=str(tmp_path / "reward"), prompts=data,
        template="chatml", iterations=1, rollouts=2, minibatches=1, epochs=1, max_new_tokens=6,
        lr=1e-5, out=str(tmp_path / "ppo")))
    assert json.loads((tmp_path / "ppo/done.json").read_text())["startup_checks"] == "passed"
    assert abs(metrics(tmp_path / "ppo")["rollout/kl_k1"]) < 1e-5
    assert load_tokenizer(tmp_path / "ppo/policy").sha256 == tokenizer.sha256
