"""DPO and DPO + SFT: the loss by a slow loop, microbatches, the reference, a short training."""

import json
import math

import pytest
import torch

from fgrlhf import dpo
from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.data.records import Edit, write_jsonl
from fgrlhf.engine.config import parse
from fgrlhf.sequences import pack
from tests.small import gradients, ids, llama, ppo_folder, slow_logp

PROMPTS = [ids(n, n) for n in (3, 1, 4)]
CHOSEN, REJECTED = ([ids(n, seed + n) for n in lengths]
                    for seed, lengths in ((20, (5, 2, 7)), (40, (4, 6, 1))))
BOTH = pack(PROMPTS * 2, CHOSEN + REJECTED)
TOKENS = sum(map(len, CHOSEN))


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_loss_is_its_equation_written_as_a_loop(sft_weight):
    policy, reference = llama(0), llama(1)
    R = lambda prompt, side: 0.3 * (sum(slow_logp(policy, prompt, side))
                                    - sum(slow_logp(reference, prompt, side)))
    margins = [R(p, y) - R(p, z) for p, y, z in zip(PROMPTS, CHOSEN, REJECTED)]
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / 3
    imitated = sum(sum(slow_logp(policy, p, y)) for p, y in zip(PROMPTS, CHOSEN))
    expected -= sft_weight * imitated / TOKENS
    refs = dpo.reference_logp(reference, BOTH, group=2)
    loss, found = dpo.loss_of(policy, BOTH, refs, 0.3, sft_weight, 3, TOKENS)
    assert found.tolist() == pytest.approx(margins, rel=1e-4, abs=1e-4)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_losses_and_gradients_of_microbatches_add_up():
    policy, refs = llama(0), dpo.reference_logp(llama(1), BOTH)
    loss, _ = dpo.loss_of(policy, BOTH, refs, 0.3, 0.5, 3, TOKENS)
    loss.backward()
    whole = gradients(policy)
    for part in ([0, 2], [1]):
        rows = torch.tensor(part + [3 + i for i in part])
        dpo.loss_of(policy, BOTH.rows(rows), refs[rows], 0.3, 0.5, 3, TOKENS)[0].backward()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


def test_a_policy_that_is_the_reference_has_margin_zero():
    loss, margins = dpo.loss_of(llama(0), BOTH, dpo.reference_logp(llama(0), BOTH), 0.3, 0.0, 3,
                                TOKENS)
    assert margins.tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


def run(root, out: str, *more: str) -> dict:
    dpo.train(parse(dpo.Config, "", [
        "--data", f"{root}/edits.jsonl", "--model", f"{root}/policy", "--out", f"{root}/{out}",
        "--epochs", "4", "--batch", "2", "--lr", "3e-3", *more]))
    lines = (root / out / "metrics.jsonl").read_text().splitlines()
    return {"first": json.loads(lines[0]), "last": json.loads(lines[-1]), "lines": lines}


def test_training_prefers_the_edits_and_leaves_a_policy_with_its_encoding(tmp_path):
    root = ppo_folder(tmp_path)
    write_jsonl(root / "edits.jsonl", [Edit("1", "name", "it river", "it is"),
                                       Edit("2", "name the", "the red", "red is"),
                                       Edit("3", "name it", "is it", "it is red")])
    found = run(root, "dpo", "--sft-weight", "1")
    assert found["last"]["dpo/loss"] < found["first"]["dpo/loss"]
    assert found["last"]["dpo/accuracy"] == 1.0
    done = json.loads((root / "dpo/done.json").read_text())
    assert (done["records"], done["steps"]) == (3, 8)
    policy, before = load_model(root / "dpo/policy"), load_model(root / "policy")
    tokenizer = load_tokenizer(root / "dpo/policy")
    prompt = tokenizer.encode("name ->", bos=True)
    gain = lambda text: (sum(slow_logp(policy, prompt, tokenizer.encode(text, eos=True)))
                         - sum(slow_logp(before, prompt, tokenizer.encode(text, eos=True))))
    assert gain("it is") > gain("it river")
    assert json.loads((root / "dpo/policy/encoding.json").read_text())["template"] == "plain"
    assert run(root, "parts", "--sft-weight", "1", "--microbatch", "1")["last"][
        "dpo/loss"] == pytest.approx(found["last"]["dpo/loss"], rel=1e-3)
