"""Every command that takes a model folder takes the path of a GGUF file too."""

import json

import pytest

import eval as evaluation
import train_ppo
import train_rm
from fgrlhf import sft
from fgrlhf.checkpoint import ExportConfig, export, load_model, load_tokenizer, save_model
from fgrlhf.data import records
from fgrlhf.data.fields import UserError
from fgrlhf.engine import lora
from fgrlhf.plan import __main__ as plan
from tests import gguf_files
from tests.gguf_files import describe, weights, write
from tests.small import llama
from tests.test_gguf import MERGES, TOKENS

EDITS = [records.Edit(str(i), "hell he", original=f"the hell {i} he", edited=f"the hello {i} he")
         for i in range(8)]


@pytest.fixture
def model(tmp_path) -> str:
    """A GGUF file with a byte-level BPE, of an untrained model."""
    small = llama(vocab_size=len(TOKENS), max_seq_len=96, tie_embeddings=True)
    return str(write(tmp_path / "models" / "m.gguf", describe(small)
                     | gguf_files.bpe(TOKENS, MERGES, 3), weights(small)))


@pytest.fixture
def data(tmp_path) -> str:
    records.write_jsonl(tmp_path / "edits.jsonl", EDITS)
    records.write_jsonl(tmp_path / "prompts.jsonl",
                        [records.Prompt(str(i), "hell he") for i in range(4)])
    return str(tmp_path / "edits.jsonl")


@pytest.mark.parametrize("rank", [0, 2])
def test_training_starts_from_a_gguf_file(rank, model, data, tmp_path):
    out = lambda name: str(tmp_path / name)
    sft.train(sft.Config(model=model, data=data, out=out("sft"), batch=4, lora_rank=rank))
    train_rm.train(train_rm.Config(model=model, data=data, out=out("rm"), batch=4,
                                   lora_rank=rank))
    train_ppo.train(train_ppo.Config(
        method="fine-grained", policy=model, reward=out("rm/reward"),
        prompts=out("prompts.jsonl"), out=out("ppo"), iterations=1, rollouts=4, minibatches=1,
        max_new_tokens=8, lora_rank=rank))
    for folder in ("sft/policy", "ppo/policy"):
        assert lora.is_folder(tmp_path / folder) == bool(rank)
        trained = load_model(tmp_path / folder)
        assert trained.config == load_model(model).config
        assert load_tokenizer(tmp_path / folder).sha256 == load_tokenizer(model).sha256
    export(ExportConfig(model=out("ppo/policy"), out=out("hf")))
    assert load_tokenizer(tmp_path / "hf").sha256 == load_tokenizer(model).sha256


def test_answers_and_plans_are_made_from_a_gguf_file(model, data, tmp_path, capsys):
    evaluation.outputs(evaluation.OutputsConfig(
        policy=model, prompts=str(tmp_path / "prompts.jsonl"), out=str(tmp_path / "answers.json"),
        max_new_tokens=8))
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers) == 4 and answers[0]["generator"] == model
    plan.main(plan.Config(model=model, prompt=16, response=16))
    assert "GB" in capsys.readouterr().out


def test_a_new_model_takes_the_tokenizer_of_any_file(model, data, tmp_path):
    tokenizer = load_tokenizer(model)
    save_model(load_model(model), tmp_path / "folder", tokenizer=tokenizer)
    for name, file in enumerate((model, tmp_path / "folder" / "tokenizer.json",
                                 tmp_path / "folder")):
        out = tmp_path / f"sft{name}"
        sft.train(sft.Config(init="tiny", tokenizer=str(file), data=data, epochs=0, out=str(out)))
        assert load_tokenizer(out / "policy").sha256 == tokenizer.sha256
        assert load_model(out / "policy").config.vocab_size == len(TOKENS)
    with pytest.raises(UserError, match="none.json: expected a byte-level BPE.*, got nothing"):
        sft.train(sft.Config(init="tiny", tokenizer=str(tmp_path / "none.json"), data=data,
                             out=str(tmp_path / "none")))
