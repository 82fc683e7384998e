"""The commands of the pages are run, with other names of files and with smaller sizes.

Those of the main page for a real model and one's own data, those of the engine's page for a larger
model, and the command of `explain`. The scripts parse the stages of every profile of reproduce.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fgrlhf.checkpoint import load_tokenizer, save_model
from fgrlhf.data.records import Demonstration, Edit, write_jsonl
from fgrlhf.engine.config import parser
from fgrlhf.reproduce import stages
from fgrlhf.tokenizer import train
from tests import processes
from tests.small import llama
from tests.test_readme import GLOSSARY, TEXTS, config_of

VOCABULARY = 300
SMALLER = {"train_ppo.py": ["--iterations", "2", "--rollouts", "4", "--minibatches", "1",
                            "--max-new-tokens", "8"],
           "eval.py outputs": ["--max-new-tokens", "8"],
           "train_rm.py": ["--epochs", "1"], "fgrlhf.sft": ["--epochs", "1"]}
OWN_FILES = {"$EDITS": "mine.jsonl", "$PROMPTS": "mine.jsonl", "$MODEL": "LLAMA_DIR"}
FRUIT = ("apple", "pear", "plum", "grape", "lemon")


def block_of(page: str, first: str) -> list[list[str]]:
    """The commands, as words, of the block on `page` that begins with `first`."""
    blocks = re.findall(r"```\w*\n(.*?)```", TEXTS[page], re.S)
    block = next(block for block in blocks if block.startswith(first))
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a user has: a checkpoint, twenty edits, demonstrations and prompts."""
    root = tmp_path_factory.mktemp("user")
    edits = [Edit(f"{k}-{fruit}", f"Name a fruit, number {k}, with {fruit[0]}.",
                  f"It is the {fruit} stone.", f"It is the {fruit}.")
             for k in range(4) for fruit in FRUIT]
    assert len({edit.id for edit in edits}) == 20
    write_jsonl(root / "mine.jsonl", edits)
    write_jsonl(root / "edits.jsonl", edits[:6])
    write_jsonl(root / "demonstrations.jsonl",
                [Demonstration(e.id, e.prompt, e.edited) for e in edits[:6]])
    (root / "prompts.jsonl").write_text('{"id": "1", "prompt": "Name a fruit."}\n')
    tokenizer = train([e.prompt + e.original for e in edits], VOCABULARY, root / "t.model")
    save_model(llama(vocab_size=VOCABULARY, max_seq_len=512), root / "LLAMA_DIR",
               tokenizer=tokenizer)
    return root


def run(folder: Path, words: list[str]) -> processes.Done:
    """A command with every path moved into `folder`; the last value of a flag counts."""
    here = lambda word: str(folder / word) if re.match(r"(runs/|LLAMA_DIR|\w+\.jsonl?\b)", word) \
        else word
    words = [here(OWN_FILES.get(word, word)) for word in words]
    script = words[2:] if words[1] == "-m" else words[1:]
    smaller = next((flags for name, flags in SMALLER.items()
                    if " ".join(script).startswith(name)), [])
    done = processes.run(folder, *script, *smaller)
    assert done.status == 0, (words, done.err[-800:])
    return done


def metrics_in(folder: Path) -> set[str]:
    return {name for path in folder.rglob("metrics.jsonl")
            for line in path.read_text().splitlines() for name in json.loads(line)} - {"step"}


def keys_in(folder: Path) -> set[str]:
    return {name for path in folder.rglob("done.json") for name in json.loads(path.read_text())}


def test_own_data_goes_from_twenty_edits_to_a_win_rate(folder):
    outputs = [run(folder, words) for words in block_of("README.md", "EDITS=")]
    assert len(outputs) == 8
    assert 0 <= json.loads((folder / "runs/mine/folds/done.json").read_text())["pair_accuracy"] <= 1
    assert "equations (5) to (7)" in outputs[2].out                     # explain found the policy
    assert len(json.loads((folder / "runs/mine/after.json").read_text())) == 20
    verdict = json.loads(outputs[-2].out)
    assert verdict["wins"] + verdict["ties"] + verdict["losses"] == 20
    assert outputs[-1].out.count("  before  R = ") == 20
    assert "R is higher in after than in before for" in outputs[-1].out
    assert "Token rewards" in (folder / "runs/mine/answers.html").read_text()


def test_own_data_names_what_the_quick_profile_leaves():
    text = TEXTS["README.md"]
    seed = stages.Seed(0, Path("runs/quick/seed0"), "cpu")
    stages.start(seed)
    left = {stage.command[stage.command.index("--out") + 1] for stage in seed.stages}
    for name in ("EDITS", "PROMPTS", "MODEL"):
        path = Path(re.search(rf"^{name}=(\S+)", text, re.M)[1])
        assert str(path.parent) in left, path


def test_a_checkpoint_is_read_tuned_and_answers(folder):
    told, needs = [run(folder, words) for words in block_of(
        "README.md", "python -m fgrlhf.generate")]
    assert told.out.startswith("Once upon a time") and "weights" in needs.out
    for words in block_of("fgrlhf/engine/README.md", "python -m fgrlhf.sft"):
        run(folder, words)
    assert json.loads((folder / "outputs.json").read_text())[0]["instruction"] == "Name a fruit."


def test_glossary_has_every_metric_that_these_runs_left(folder):
    """What is really written, however its name is put together in the code."""
    metrics = metrics_in(folder / "runs")
    assert len(metrics) > 20
    assert not {name for name in metrics if f"`{name}`" not in GLOSSARY
                and f"`{name.removeprefix('rm/')}`" not in GLOSSARY
                and not re.match("rm/(train_|minimal/|equal_length/)", name)}
    assert not {key for key in keys_in(folder / "runs")
                if f"`{key}`" not in GLOSSARY and f"`rm/{key}`" not in GLOSSARY
                and not re.search("^train_|^minimal/|^equal_length/|_sd$", key)}


def test_explain_command_of_the_readme_names_what_the_quick_profile_leaves():
    words = block_of("fgrlhf/explain/README.md", "python -m fgrlhf.explain")[0]
    config = config_of(words)(**vars(parser(config_of(words)).parse_args(words[3:])))
    seed = stages.Seed(0, Path("runs/quick/seed0"), "cpu")
    stages.start(seed), stages.compare_systems(seed)
    left = {stage.command[stage.command.index("--out") + 1] for stage in seed.stages}
    used = (config.reward, config.record, config.policy)
    assert {str(Path(path).parent) for path in used} <= left


@pytest.mark.parametrize("options", [(), ("bfloat16", 8)])
@pytest.mark.parametrize("profile", stages.PROFILES)
def test_every_stage_of_reproduce_is_a_command_its_script_understands(profile, options):
    seed = stages.Seed(0, Path("runs/x/seed0"), "cpu", *options)
    stages.start(seed)
    stages.PROFILES[profile](seed)
    for stage in seed.stages:
        words = shlex.split(stage.text[stage.text.index("python "):])
        subcommand = words[1] == "eval.py" or words[2] == "fgrlhf.simulate"
        parser(config_of(words)).parse_args(words[2 + (words[1] == "-m") + subcommand:])


def test_stages_of_reproduce_take_its_dtype_and_those_behind_sft_its_adapters():
    """Every model is in bfloat16; all that is trained has adapters, but for the SFT model."""
    seed = stages.Seed(0, Path("runs/x/seed0"), "cpu", "bfloat16", 8)
    stages.start(seed), stages.compare_systems(seed)
    trained = 0
    for stage in seed.stages:
        config = config_of(["python", *stage.command])
        given = vars(parser(config).parse_args(stage.command[
            1 + (stage.command[0] in ("-m", "eval.py")) + ("fgrlhf.simulate" in stage.command):]))
        assert given.get("dtype", "bfloat16") == "bfloat16"
        if "lora_rank" in given:
            trained += 1
            assert given["lora_rank"] == (0 if given.get("init") else 8), stage.text
    assert trained == 1 + 3 + 3 + 2                     # SFT, reward models, PPO, rivals


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("variables, expected", [
    ("", ("quick", 1, "runs/quick", os.cpu_count())),
    ("PROFILE=full SEEDS=4 WORKERS=3", ("full", 4, "runs/full", 3)),
    ("PROFILE=sweep OUT='my runs'", ("sweep", 1, "my runs", os.cpu_count()))])
def test_make_reproduce_is_the_quick_profile_unless_told_otherwise(variables, expected):
    """`make -n` prints the command and does not run it. A variable of the shell changes nothing."""
    shell = {name: value for name, value in os.environ.items() if name not in ("OUT", "MAKEFLAGS")}
    done = subprocess.run(["make", "-n", "reproduce", *shlex.split(variables)], cwd=processes.ROOT,
                          env=shell | {"PROFILE": "x", "SEEDS": "x", "WORKERS": "x"},
                          capture_output=True, text=True, check=True)
    command = re.search(r"python -m fgrlhf\.reproduce .*", done.stdout.replace("\\\n", ""))[0]
    words = shlex.split(command)
    found = parser(config_of(words)).parse_args(words[3:])
    assert (found.profile, found.seeds, found.out, found.workers) == expected


def test_generate_reads_a_real_checkpoint_as_the_readme_says(data_dir, tmp_path):
    """stories260K in place of LLAMA_DIR, and its tokenizer survives twenty edits' training."""
    words = block_of("README.md", "python -m fgrlhf.generate")[0]
    words = [str(data_dir / "stories260K") if word == "LLAMA_DIR" else word for word in words]
    done = processes.run(tmp_path, *words[2:])
    golden = (data_dir / "stories260K" / "greedy_200.txt").read_text()
    assert done.status == 0 and done.out.startswith("Once upon a time")
    assert golden.startswith(done.out.rstrip()[:60])
    assert load_tokenizer(data_dir / "stories260K").vocab_size == 512
