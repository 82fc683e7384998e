"""One record explained: every printed number against its equation, computed here by hand."""

import json
import math
import re
import shutil

import pytest
import torch

import eval as evaluation
import train_ppo
import train_rm
from fgrlhf.bpe import BPETokenizer
from fgrlhf.checkpoint import load_tokenizer, save_model
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Edit, Output, Span, write_jsonl, write_outputs
from fgrlhf.engine.config import parse
from fgrlhf.explain import __main__ as explain
from fgrlhf.explain.explained import (
    LossSettings, UpdateSettings, explain_record, minus_log_sigmoid, prompt_text, settings_of)
from fgrlhf.explain.text import explained_text, visible
from fgrlhf.reproduce.examples import explain_edit
from fgrlhf.reproduce.report import page
from fgrlhf.reward import RewardModel, load_reward, save_reward
from fgrlhf.sequences import pack
from fgrlhf.tokenizer import train
from kernels import token_preference
from tests.small import llama, slow_logp
from tests.test_gguf import MERGES, TOKENS

VOCABULARY = 274
SWAP = Edit("swap", "red or blue", "a red cat", "a blue cat")
GAP = Edit("gap", "red or blue", "a red", "a red cat")
TRAINED = LossSettings(reduce="sum", u0="anchor", u0_weight=0.02, token_weight=1.0)
PPO = UpdateSettings(lr=0.03)
COLUMNS = ("r_t", "old", "ref", "kl", "penalised", "A", "new", "rho", "term")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train(["a red cat or a blue one"] * 9, VOCABULARY,
                 tmp_path_factory.mktemp("t") / "tokenizer.model")


def model(seed: int):
    return llama(seed, VOCABULARY, max_seq_len=64)


@pytest.fixture(scope="module")
def reward():
    torch.manual_seed(0)
    made = RewardModel(model(1), "token")
    made.mean.fill_(0.25), made.scale.fill_(0.5)
    return made.requires_grad_(False)


@pytest.fixture(scope="module", params=["swap", "gap"])
def explained(request, tokenizer, reward):
    record = {"swap": SWAP, "gap": GAP}[request.param]
    return explain_record(record, tokenizer, reward, TRAINED, model(2), model(3), PPO)


def sides(text: str) -> tuple[list[tuple], list[tuple]]:
    """(set, reward) of each row of the first table: y-, then y+."""
    table = text.split("set        r_t")[-1].split("\n\n")[0].splitlines()[1:]
    found = [], []
    for row in table:
        for side, half in zip(found, row.split(" | ")):
            if match := re.match(r" *(\d+) (.{12}) (.{4}) *(\S+)", half):
                side.append((match[3].strip(), float(match[4])))
    return found


def values(text: str, label: str, name: str) -> float:
    """The value after the last " = " of the first equation of that name under that label."""
    lines = iter(text.splitlines())
    at = ""
    for line in lines:
        at = line[:10].strip() or (at if line.startswith("  ") else "")
        if at == label and line[12:].startswith(f"{name} = "):
            if line.count(" = ") == 1 and not re.search(r"[\de]$", line):
                line = next(lines)
            if (following := next(lines, "")).strip().startswith("= "):
                line = following
            return float(line.rsplit(" = ", 1)[1])
    raise AssertionError(f"{label} {name} is not in the text")


def test_explained_text_shows_rewards_that_give_the_margin_and_the_loss_by_hand(explained):
    """Equations (1) to (4), computed from the printed table only."""
    text = explained_text(explained)
    minus, plus = sides(text)
    assert values(text, "(1)", "R(y-)") == pytest.approx(sum(r for _, r in minus), abs=1e-3)
    assert values(text, "(1)", "R(y+)") == pytest.approx(sum(r for _, r in plus), abs=1e-3)
    good = [r for name, r in plus if name.startswith("U1+")]
    bad = [r for name, r in minus if name.startswith("U1-")]
    assert good and bad
    s = sum(good) - sum(bad)
    assert values(text, "(3)", "sum over U1+") == pytest.approx(sum(good), abs=1e-3)
    assert values(text, "(3)", "sum over U1-") == pytest.approx(sum(bad), abs=1e-3)
    assert values(text, "(3)", "s") == pytest.approx(s, abs=1e-3)
    bt = math.log(1 + math.exp(-s))
    kept = [r for name, r in minus if name == "U0"], [r for name, r in plus if name == "U0"]
    M, K = len(kept[0]), len(good) + len(bad)
    assert len(kept[1]) == M > 0
    anchor = 0.02 / (2 * M) * sum(r * r for side in kept for r in side)
    token = (sum(math.log(1 + math.exp(-r)) for r in good)
             + sum(math.log(1 + math.exp(r)) for r in bad)) / K
    mean = lambda side: sum(r for _, r in side) / len(side)
    paper = math.log(1 + math.exp(mean(minus) - mean(plus)))
    for label, name, expected in (("(4)", "L_bt", bt), ("(4)", "L_u0", anchor),
                                  ("(4)", "L_token", token), ("(4)", "L", bt + anchor + token),
                                  ("(4) paper", "L_bt", paper), ("(4) paper", "L", paper)):
        assert values(text, label, name) == pytest.approx(expected, abs=2e-3), (label, name)


def test_explained_loss_is_the_kernels(explained):
    """The plain reference of the kernel gets the same rewards and sets, without a tokenizer."""
    sets = {"rejected": explained.rejected, "chosen": explained.chosen}
    tensors = {k: torch.tensor([s.rewards]) for k, s in sets.items()}
    masks = {k: torch.tensor([[name in ("U1", "gap") for name in s.sets]]) for k, s in sets.items()}
    unchanged = token_preference.Unchanged(
        *(torch.tensor(x) for x in ([0] * len(explained.pairs), [j for _, j in explained.pairs],
                                    [i for i, _ in explained.pairs])))
    lengths = token_preference.Lengths(*(torch.tensor([len(sets[side].rewards)])
                                         for side in ("chosen", "rejected")))
    for loss in (explained.loss, explained.paper):
        expected = token_preference.reference(
            tensors["chosen"], tensors["rejected"], masks["chosen"], masks["rejected"], unchanged,
            lengths, loss.options)
        assert loss[1:] == pytest.approx([expected.margin.item(), expected.bt.item(),
                                          expected.u0.item(), expected.token.item(),
                                          expected.loss.item()], rel=1e-5, abs=1e-7)
    assert explained.paper.options == token_preference.Options()


@pytest.mark.parametrize("u0", token_preference.U0_TERMS)
@pytest.mark.parametrize("how", ["sum", "mean", "share"])
def test_explained_text_fills_every_option_of_the_loss_with_numbers_that_give_it(u0, how, tokenizer,
                                                                              reward):
    """The right-hand side of L_u0 as it is printed gives the kernel's value."""
    shown = explain_record(SWAP, tokenizer, reward, LossSettings(u0=u0, u0_weight=0.3, reduce=how))
    text = explained_text(shown)
    numbers = re.search(r"L_u0 (?:= .*\n? *)*?= ([\d.]+) / (\d+) \* ([\d.e-]+) = (\S+)$", text,
                        re.M)
    lam, count, total, value = map(float, numbers.groups())
    assert lam == 0.3 and value == pytest.approx(lam / count * total, abs=1e-4)
    assert value == pytest.approx(shown.loss.u0, abs=1e-4)
    assert values(text, "(3)", "s") == pytest.approx(
        values(text, "(3)", f"{how} over U1+") - values(text, "(3)", f"{how} over U1-"), abs=1e-3)


def test_explained_text_of_a_model_of_the_papers_loss_has_means_and_no_other_form(tokenizer):
    torch.manual_seed(0)
    made = RewardModel(model(1), "token", "mean").requires_grad_(False)
    text = explained_text(explain_record(SWAP, tokenizer, made, LossSettings()))
    minus, plus = sides(text)
    R = [sum(r for _, r in side) / len(side) for side in (minus, plus)]
    assert values(text, "(1)", "R(y-)") == pytest.approx(R[0], abs=1e-3)
    assert values(text, "(1)", "R(y+)") == pytest.approx(R[1], abs=1e-3)
    assert values(text, "(4)", "L") == pytest.approx(math.log(1 + math.exp(R[0] - R[1])), abs=2e-3)
    assert "\n(3) " not in text and "(4) paper" not in text


def token_rows(text: str) -> list[dict]:
    """The rows of the table of equations (5) to (7)."""
    table = text.split("clip     term\n")[1].split("\n\n")[0].splitlines()
    rows = []
    for line in table:
        numbers = [float(line[14 + 9 * k:23 + 9 * k]) for k in range(8)] + [float(line[-8:])]
        rows.append(dict(zip(COLUMNS, numbers)) | {"clip": line[86:92].strip()})
    return rows


def test_explained_text_shows_kl_advantage_ratio_and_clip_that_follow_by_hand(explained):
    """Equations (5) to (7) from the printed rows, rounded to three decimals."""
    text = explained_text(explained)
    rows, eps = token_rows(text), 0.2
    assert len(rows) == len(explained.rejected.pieces)
    for row, raw in zip(rows, explained.rejected.rewards):
        assert row["r_t"] == pytest.approx((raw - 0.25) / 0.5, abs=1e-3)
        assert row["kl"] == pytest.approx(row["old"] - row["ref"], abs=2e-3)
        assert row["penalised"] == pytest.approx(row["r_t"] - 0.5 * row["kl"], abs=2e-3)
        assert row["rho"] == pytest.approx(math.exp(row["new"] - row["old"]), rel=2e-3, abs=2e-3)
    rms = math.sqrt(sum(row["penalised"] ** 2 for row in rows) / len(rows))
    clips = 0
    for row in rows:
        assert row["A"] == pytest.approx(row["penalised"] / rms, rel=2e-3, abs=2e-3)
        bound = min(max(row["rho"], 1 - eps), 1 + eps)
        free, held = row["rho"] * row["A"], bound * row["A"]
        assert row["term"] == pytest.approx(min(free, held), rel=5e-3, abs=3e-3)
        if abs(free - held) > 5e-3:
            assert row["clip"] == ("" if free < held else ">1.2" if row["A"] > 0 else "<0.8")
            clips += row["clip"] != ""
    assert clips > 0
    mean = lambda name: sum(row[name] for row in rows) / len(rows)
    assert values(text, "(7)", "L before the update") == pytest.approx(-mean("A"), abs=2e-3)
    assert values(text, "(7)", "L after the update") == pytest.approx(-mean("term"), abs=3e-3)
    assert explained.update.loss < explained.update.loss_before          # the step goes downhill


def test_explained_log_probabilities_are_those_of_a_slow_loop(explained, tokenizer):
    prompt = tokenizer.encode("red or blue ->", bos=True)
    response = tokenizer.encode("".join(explained.rejected.texts[:-1]), eos=True)
    for found, seed in ((explained.update.logp_old, 2), (explained.update.logp_ref, 3)):
        assert found == pytest.approx(slow_logp(model(seed), prompt, response), abs=1e-4)


def test_explained_text_marks_what_changed_without_colour(tokenizer, reward):
    swap, gap = (explained_text(explain_record(r, tokenizer, reward, TRAINED)) for r in (SWAP, GAP))
    assert re.search(r"^y-  a \[-.*red.*-\] cat</s>$", swap, re.M)
    assert re.search(r"^y\+  a \{\+.*blue.*\+\} cat</s>$", swap, re.M)
    assert re.search(r"^y-  a red\(\^</s>\^\)$", gap, re.M)
    assert re.search(r"^y\+  a red \{\+cat\+\}</s>$", gap, re.M)
    assert "\x1b" not in swap and "equations (5)" not in swap


def test_explained_text_in_colour_says_the_same(explained):
    coloured = explained_text(explained, colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == explained_text(explained)


def test_visible_spells_out_what_a_terminal_would_act_on():
    assert visible("a\x1b[31mb\nc") == "a\\x1b[31mb\u21b5c"


def test_byte_level_tokens_and_control_tokens_are_shown_as_text():
    tokenizer = BPETokenizer("t", TOKENS, MERGES, "gpt2", {"<|start|>": 0, "<|end|>": 1}, 0, 1)
    record = Edit("bpe", "hell", "hell \u00e9", "he hell")
    shown = explain_record(record, tokenizer, RewardModel(llama(1, len(TOKENS)), "token"),
                           LossSettings(template="<|start|>{prompt}<|end|>{response}"))
    assert shown.rejected.pieces == ["hell", "\u2581", "\\xc3", "\\xa9", "<|end|>"]
    assert shown.rejected.texts == ["hell", " ", "\u00e9", "", "<|end|>"]
    assert shown.chosen.pieces == ["he", "\u2581hell", "<|end|>"]
    assert shown.prompt == "hell<|end|>"                                    # BOS is left out
    tokenizer.adds_bos = False
    assert prompt_text(tokenizer, [0, 0, *tokenizer.encode("he he"), 1]) == \
        "<|start|><|start|>he he<|end|>"


def test_explained_texts_join_to_the_response_when_bytes_share_a_character(tokenizer, reward):
    record = Edit("bytes", "red or blue", "a \u20ac cat", "a red cat")       # three byte pieces
    shown = explain_record(record, tokenizer, reward, TRAINED)
    assert "".join(shown.rejected.texts) == "a \u20ac cat</s>"
    assert "[-\u20ac-]" in explained_text(shown)


def test_report_shows_the_same_numbers_and_escapes_texts(explained, tokenizer, reward):
    html = page({"examples": {"explained": [explained]}}).replace("\N{MINUS SIGN}", "-")
    for number in re.findall(r"= (-?\d\.\d{4})$", explained_text(explained), re.M):
        assert f">{number}</td>" in html
    assert "<del" in html and "<ins" in html and html.count(">clip</td>") == sum(
        explained.update.clipped)
    nasty = Edit("n", "<script>", "a <b> cat", "a red cat")
    html = page({"examples": {"explained": [explain_record(nasty, tokenizer, reward, TRAINED)]}})
    assert "<script>" not in html and "<b> cat" not in html


def test_minus_log_sigmoid_far_out_does_not_overflow():
    assert minus_log_sigmoid(-800.0) == 800.0 and minus_log_sigmoid(800.0) == 0.0
    assert minus_log_sigmoid(0.0) == pytest.approx(math.log(2))


# ----- the command --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, reward):
    """The folders that runs leave: a reward model and a policy, and a file of edits."""
    root = tmp_path_factory.mktemp("runs")
    save_model(model(3), root / "sft/policy", tokenizer=tokenizer)
    save_reward(reward, root / "rm/reward", tokenizer)
    save_model(model(2), root / "ppo/best", tokenizer=tokenizer)
    (root / "sft/config.json").write_text(json.dumps({"lr": 9.0, "template": "alpaca"}))
    (root / "rm/config.json").write_text(json.dumps(
        {"reduce": "sum", "u0": "anchor", "u0_weight": 0.02, "token_weight": 1.0, "epochs": 3,
         "model": str(root / "sft/policy")}))
    (root / "ppo/config.json").write_text(json.dumps(
        {"method": "fine-grained", "beta": 0.5, "lr": 0.03, "policy": str(root / "sft/policy"),
         "iterations": 2}))
    write_jsonl(root / "edits.jsonl", [SWAP, Edit("same", "x", "a", "a"), GAP])
    return root


def config(folders, **changed) -> explain.Config:
    return explain.Config(**{"reward": str(folders / "rm/reward"),
                             "record": str(folders / "edits.jsonl:gap")} | changed)


def test_explain_takes_settings_and_reference_from_the_runs(folders, tokenizer, reward, capsys):
    explain.main(config(folders, policy=str(folders / "ppo/best"), html=str(folders / "a.html")))
    printed = capsys.readouterr().out
    expected = explained_text(
        explain_record(GAP, tokenizer, reward, TRAINED, model(2), model(3), PPO))
    assert printed.endswith(f"\n\n{expected}\n{folders}/a.html\n")
    assert f"reference {folders}/sft/policy\n" in printed
    assert "One edit in every equation" in (folders / "a.html").read_text()


def test_explain_without_a_policy_takes_the_reward_models_start_and_kl_is_0(folders):
    explained, used = explain.explain(config(folders, record=str(folders / "edits.jsonl")))
    assert explained.id == "swap" and used["policy"] == used["reference"] == f"{folders}/sft/policy"
    assert explained.update.kl == [0.0] * len(explained.rejected.pieces)
    assert explained.update.settings == UpdateSettings()               # not SFT's learning rate


@pytest.mark.parametrize("run, settings, reference", [
    ("dpo", {"beta": 0.1, "lr": 9.0, "model": "sft/policy"}, "sft/policy"),
    ("sft-of-a-preset", {"lr": 9.0, "model": None}, "sft-of-a-preset/policy"),
    ("elsewhere", None, "elsewhere/policy")])
def test_explain_of_a_policy_that_ppo_did_not_train_says_what_is_used(run, settings, reference,
                                                                      folders, tokenizer, capsys):
    """DPO has a --beta and a --lr too, which are not PPO's."""
    policy = folders / run / "policy"
    save_model(model(2), policy, tokenizer=tokenizer)
    if settings is not None:
        if settings["model"]:
            settings = settings | {"model": str(folders / settings["model"])}
        (policy.parent / "config.json").write_text(json.dumps(settings))
    explained, used = explain.explain(config(folders, policy=str(policy)))
    assert used["reference"] == str(folders / reference)
    assert explained.update.settings == UpdateSettings()
    assert any(explained.update.kl) == (run == "dpo")
    assert capsys.readouterr().err.endswith(
        f"\n{policy}: in the folder above there is no config.json of train_ppo.py, so equations "
        "(5) to (7) are shown with the default settings of PPO and with the reference "
        f"{folders / reference}\n")


def test_explain_gives_eos_the_reward_that_it_had_in_the_run(folders, tmp_path, tokenizer):
    """EOS without a reward changes (5) at EOS, and (6) at every token because of the rms."""
    shutil.copytree(folders / "ppo", tmp_path / "ppo")
    run = json.loads((tmp_path / "ppo/config.json").read_text())
    (tmp_path / "ppo/config.json").write_text(json.dumps(run | {"reward_eos": False}))
    before, _ = explain.explain(config(folders, policy=str(folders / "ppo/best")))
    after, _ = explain.explain(config(folders, policy=str(tmp_path / "ppo/best")))
    assert after.update.calibrated == [*before.update.calibrated[:-1], 0.0]
    kl, beta = after.update.kl, after.update.settings.beta
    penalised = [r - beta * k for r, k in zip(after.update.calibrated, kl)]
    rms = (sum(x * x for x in penalised) / len(penalised)) ** 0.5
    assert after.update.advantages == pytest.approx([x / rms for x in penalised], rel=1e-4)
    assert before.update.calibrated[-1] != 0
    last = len(kl) - 1
    said = f"r_{last} is 0, because EOS gets no reward (--no-reward-eos)."
    assert said in explained_text(after) and said not in explained_text(before)


def test_explain_of_another_ppo_method_says_that_its_advantages_are_not_shown(folders, tmp_path,
                                                                              capsys):
    shutil.copytree(folders / "ppo", tmp_path / "ppo")
    run = json.loads((tmp_path / "ppo/config.json").read_text())
    (tmp_path / "ppo/config.json").write_text(json.dumps(run | {"method": "rlhf", "gamma": 1.0}))
    explained, _ = explain.explain(config(folders, policy=str(tmp_path / "ppo/best")))
    assert explained.update.settings == UpdateSettings()
    assert "--method rlhf trained it, whose advantages are not those" in capsys.readouterr().err


def test_explain_without_a_policy_needs_nothing_but_the_reward_models_start(folders, tmp_path):
    """The model from which that start was trained is gone, and is not wanted: the KL is 0."""
    shutil.copytree(folders / "sft", tmp_path / "sft")
    shutil.copytree(folders / "rm", tmp_path / "rm")
    (tmp_path / "sft/config.json").write_text(json.dumps({"model": str(tmp_path / "gone")}))
    run = json.loads((tmp_path / "rm/config.json").read_text())
    (tmp_path / "rm/config.json").write_text(json.dumps(run | {"model": f"{tmp_path}/sft/policy"}))
    explained, used = explain.explain(config(folders, reward=str(tmp_path / "rm/reward")))
    assert used["policy"] == used["reference"] == f"{tmp_path}/sft/policy"
    assert not any(explained.update.kl)
    with pytest.raises(UserError, match="the run started from --model .*gone, which is not there"):
        explain.explain(config(folders, policy=f"{tmp_path}/sft/policy"))


def test_explain_of_a_reward_folder_without_its_run_says_that_the_loss_is_not_known(
        folders, tmp_path, capsys):
    shutil.copytree(folders / "rm/reward", tmp_path / "reward")
    explained, _ = explain.explain(config(folders, reward=str(tmp_path / "reward")))
    assert explained.loss.options == token_preference.Options()
    assert capsys.readouterr().err.endswith(
        f"\n{tmp_path}/reward: in the folder above there is no config.json of train_rm.py, so the "
        "settings of its loss are not known; the loss is shown with the defaults unit token, "
        "credit_gap True, reduce response, u0 difference, u0_weight 0.0, token_weight 0.0, "
        "pair_weight 1.0\n")
    explain.explain(config(folders))
    assert "config.json" not in capsys.readouterr().err


@pytest.mark.parametrize("html, said", [
    ("edits.jsonl", "the path of --record;"), ("rm/reward/reward.json", "a path inside --reward"),
    ("ppo/best/new.html", "a path inside --policy"), ("rm/config.json", "the path of the settings"),
    ("sft/policy/params.json", "a path inside --reference"), ("ppo", "a folder;"),
    ("link/page.html", "a path inside --reward")])
def test_explain_writes_over_none_of_its_inputs(html, said, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "load_reward", None)                  # before any work
    (tmp_path / "link").symlink_to(folders / "rm/reward")
    html = (tmp_path if html.startswith("link") else folders) / html
    with pytest.raises(UserError, match=f"--html {html}: expected a file of its own, got {said}"):
        explain.main(config(folders, policy=str(folders / "ppo/best"), html=str(html)))


def test_explain_without_any_policy_stops_at_equation_4(folders, tmp_path, tokenizer, reward,
                                                        capsys):
    save_reward(reward, tmp_path / "reward", tokenizer)
    explain.main(config(folders, reward=str(tmp_path / "reward")))
    printed = capsys.readouterr().out
    assert "(4) " in printed and "(4) paper" not in printed         # the defaults are the paper's
    assert printed.endswith("give its folder with --policy.\n")


@pytest.mark.parametrize("change, message", [
    ({"record": "nowhere.jsonl:a"}, "nowhere.jsonl:a: expected FILE or FILE:ID, found no such"),
    ({"record": "edits.jsonl:other"}, "no record 'other'"),
    ({"record": "edits.jsonl:same"}, "no record 'same' with two different texts"),
    ({"reward": "sft/policy"}, "expected a reward model folder"),
    ({"reward": "sequence/reward"}, "expected a token-level reward model"),
    ({"policy": "missing"}, "missing")])
def test_explain_refuses_bad_input_in_one_line(folders, change, message, tokenizer):
    if not (folders / "sequence").exists():
        save_reward(RewardModel(model(1), "sequence"), folders / "sequence/reward", tokenizer)
    change = {k: str(folders / v) for k, v in change.items()}
    with pytest.raises(UserError, match=re.escape(message)) as error:
        explain.explain(config(folders, **change))
    assert "\n" not in str(error.value)


def test_explain_cuts_a_response_that_does_not_fit_only_if_told(folders, tmp_path, capsys):
    long = " ".join(["red"] * 400)
    write_jsonl(tmp_path / "e.jsonl", [Edit("long", "x", "a cat " + long, "a dog " + long)])
    place = {"record": str(tmp_path / "e.jsonl")}
    with pytest.raises(UserError, match="or pass --cut-responses"):
        explain.explain(config(folders, **place))
    explained, _ = explain.explain(config(folders, **place, cut_responses=True))
    assert explained.rejected.texts[-1] != "</s>" and "U1" in explained.rejected.sets
    assert "record 'long': 2 responses lost their end" in capsys.readouterr().err


def test_explain_refuses_another_tokenizer(folders, tmp_path):
    other = train(["a red cat or a blue one"] * 9, VOCABULARY - 1, tmp_path / "t.model")
    save_model(llama(0, VOCABULARY - 1), tmp_path / "policy", tokenizer=other)
    with pytest.raises(UserError, match="expected the tokenizer of --reward"):
        explain.explain(config(folders, policy=str(tmp_path / "policy")))


def test_settings_are_named_and_defaulted_as_the_scripts_flags():
    defaults = {f.name: f.default for f in train_ppo.Config.__dataclass_fields__.values()}
    for name, value in UpdateSettings()._asdict().items():
        assert name in defaults
        if name not in ("policy", "gamma"):
            assert defaults[name] == value, name
    config = train_ppo.Config(method="fine-grained", policy="p", reward="r", prompts="x", out="o")
    assert config.gamma == UpdateSettings().gamma
    assert set(LossSettings._fields) <= set(train_rm.Config.__dataclass_fields__)
    assert settings_of(LossSettings, "/nowhere/reward").options == token_preference.Options()


def test_report_explains_the_first_edit_that_repairs_two_errors(folders, tmp_path, tokenizer,
                                                                reward):
    """The folders are named as `python -m fgrlhf.reproduce` names them."""
    spans = (Span(2, 5, "value"), Span(6, 9, "value"))
    two = Edit("two", "red or blue", "a red cat", "a blue one", spans=spans)
    for name, source in (("sft/policy", "sft/policy"), ("rm-token", "rm"), ("fine-grained", "ppo")):
        shutil.copytree(folders / source, tmp_path / name)
    write_jsonl(tmp_path / "held-out/edits.jsonl", [SWAP, two])
    [shown] = explain_edit(tmp_path, tokenizer, reward)
    assert shown.id == "two" and shown.loss.options == TRAINED.options
    assert shown.update.settings.lr == 0.03 and shown.update.kl == [0.0] * len(shown.update.kl)
    write_jsonl(tmp_path / "held-out/edits.jsonl", [SWAP])
    assert explain_edit(tmp_path, tokenizer, reward) == []


# ----- answers side by side -----------------------------------------------------------------------

def test_answers_side_by_side_have_the_rewards_of_the_model(folders, tmp_path, capsys,
                                                            monkeypatch):
    """R is the sum of the token rewards, and the lowest of them are named."""
    prompts = ("say it", "say one")
    for name, texts in (("before", ("one two", "two")), ("after", ("two one", "two"))):
        outputs = [Output(prompt, text, name) for prompt, text in zip(prompts, texts)]
        write_outputs(tmp_path / f"{name}.json", sorted(outputs, key=lambda o: o.output))
    passes, plain = [], RewardModel.hidden
    monkeypatch.setattr(RewardModel, "hidden", lambda *given: passes.append(1) or plain(*given))
    shown(f"{tmp_path}/before.json", f"{tmp_path}/after.json", "--reward", f"{folders}/rm/reward",
          "--html", f"{tmp_path}/page.html")
    out = capsys.readouterr().out
    assert len(passes) == 4                                     # one for each answer
    model, tokenizer = load_reward(folders / "rm/reward"), load_tokenizer(folders / "rm/reward")
    for text in ("one two", "two one"):
        prompt = tokenizer.encode("say it ->", bos=True)
        ids = tokenizer.encode(text, eos=True)
        with torch.no_grad():
            rewards = model.token_rewards(pack([prompt], [ids]))[0].tolist()
        assert f"R = {sum(rewards):+9.3f}   {text}\n" in out
        assert f"{min(rewards):+.2f}, " in out.split(text)[1].split("\n")[1]
    assert out.endswith(f"of 2 prompts, equal for 1.\n\n{tmp_path}/page.html\n")
    html = (tmp_path / "page.html").read_text()
    assert "R is the reward of the whole answer, equation (1)" in html and "A wavy" not in html


def answered(folder, name: str, texts: list[str], prompts=("say it", "say <b>one</b>")) -> str:
    """Writes a file of answers and returns its path."""
    path = folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_outputs(path, [Output(prompt, text, "x", other=(("input", '"here"'),))
                         for prompt, text in zip(prompts, texts)])
    return str(path)


def shown(*words: str) -> None:
    evaluation.show_answers(parse(evaluation.AnswersConfig, "", list(words)))


def test_answers_of_three_files_are_compared_with_the_first(folders, tmp_path, capsys):
    """Files with the same name are told apart by their folders."""
    files = [answered(tmp_path, f"{name}/answers", texts) for name, texts in (
        ("a", ["one two", "two"]), ("b", ["two one", "two"]), ("c", ["<script>one</script>", ""]))]
    shown(*files, "--reward", f"{folders}/rm/reward", "--html", f"{tmp_path}/page.html")
    out = capsys.readouterr().out
    found = {label: [float(r) for r in re.findall(rf"^  {label}/answers  R = +(\S+)", out, re.M)]
             for label in "abc"}
    for label in "bc":
        higher = sum(b > a for a, b in zip(found["a"], found[label]))
        assert (f"R is higher in {label}/answers than in a/answers for {higher} of 2 prompts, equal"
                f" for {int(label == 'b')}.\n") in out
    mean = [sum(values) / 2 for values in found.values()]
    row = re.search(r"^mean R +(\S+) +(\S+) +(\S+)$", out, re.M)
    assert list(map(float, row.groups())) == pytest.approx(mean, abs=2e-3)
    assert re.search(r"^words per answer +1\.5 +1\.5 +0\.5$", out, re.M)
    assert out.startswith("say it\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}here\n  a/answers  R =")
    html = (tmp_path / "page.html").read_text()
    assert html.count('<th scope="row" dir="auto">') == 2 and "say &lt;b&gt;one" in html
    assert "<script" not in html and "&lt;script&gt;one" in html
    assert html.count('class="heat"') == 6


def test_answers_without_a_reward_model_have_no_rewards(tmp_path, capsys):
    files = [answered(tmp_path, name, ["one two", "two"]) for name in ("before", "after")]
    shown(*files, "--html", f"{tmp_path}/page.html", "--limit", "1")
    out = capsys.readouterr().out
    assert out == ("say it\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}here\n  before  one two\n"
                   "  after   one two\n\nMeans             before  after\n"
                   "-------------------------------\nwords per answer     2.0    2.0\n"
                   f"\n{tmp_path}/page.html\n")
    assert "Token rewards" not in (tmp_path / "page.html").read_text()


def test_answers_says_that_it_shows_and_averages_the_first_prompts_only(folders, tmp_path, capsys):
    prompts = [f"say {n}" for n in range(25)]
    files = [answered(tmp_path, name, [text] * 25, prompts) for name, text in
             (("before", "one two"), ("after", "two one"))]
    page, reward = f"{tmp_path}/page.html", ("--reward", f"{folders}/rm/reward")
    shown(*files, *reward, "--html", page)
    out, err = capsys.readouterr()
    assert re.search(r"^R is higher in after than in before for \d+ of the first 20 of 25 prompts, "
                     r"equal for \d+\.$", out, re.M)
    assert "shown are the answers to the first 20 of 25 prompts; --limit changes that\n" in err
    html = (tmp_path / "page.html").read_text()
    assert "Over the first 20 of 25 prompts." in html and " of the first 20 of 25 prompts, " in html
    shown(*files, "--html", page)
    out, err = capsys.readouterr()
    assert err == "shown are the answers to the first 20 of 25 prompts; --limit changes that\n"
    assert "Over the first 20 of 25 prompts." in (tmp_path / "page.html").read_text()
    shown(*files, *reward, "--limit", "25")
    out, err = capsys.readouterr()
    assert " of 25 prompts, equal for " in out and "first" not in out + err


def test_answers_refuses_a_page_that_cannot_be_written_before_any_work(folders, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setattr("fgrlhf.explain.answers.read_outputs", None)
    files = [answered(tmp_path, name, ["a", "b"]) for name in ("one", "two")]
    for html, said in ((f"{folders}/rm/reward/reward.json", "a file of its own, got a path inside "
                                                            "--reward"),
                       (f"{tmp_path}", "a file of its own, got a folder"),
                       (f"{folders}/edits.jsonl/page.html", "cannot be written")):
        with pytest.raises(UserError, match=f"--html {html}: .*{said}"):
            shown(*files, "--reward", f"{folders}/rm/reward", "--html", html)


def test_answers_refuses_what_it_cannot_compare(tmp_path):
    one = answered(tmp_path, "one", ["a", "b"])
    other = answered(tmp_path, "other", ["a", "b"], ("say it", "say"))
    for words, message in (
            ([one], "expected two or more files of answers, got "),
            ([one, other], "other.json: expected an answer to every prompt of .*one"),
            ([one, one, "--html", one], "--html .*one.json: expected a file of its")):
        with pytest.raises(UserError, match=message):
            shown(*words)
