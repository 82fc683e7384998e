"""TUTORIAL.md: every command in it is run, in order; what is certain in its outputs is compared."""

import contextlib
import io
import json
import re
import shlex
import subprocess

import pytest

from tests import processes
from tests.test_layout import ROOT

TEXT = (ROOT / "fgrlhf/TUTORIAL.md").read_text()
# (commands, output) of each block; a command may run over several lines within double quotes.
BLOCKS = re.findall(r"```sh\n(.*?)```(?:\n\n```text\n(.*?)```)?", TEXT, re.S)


def commands_of(block: str) -> list[str]:
    return re.findall(r'((?:[^"\n]|"[^"]*")+)\n', block)


def run(command: str, folder) -> str:
    """stdout of a command line, with runs/tutorial in `folder`; Python runs in a forked process."""
    command = command.replace("runs/tutorial", str(folder / "tutorial"))
    first, _, rest = (command, "", "") if '"' in command else command.partition(" | ")
    words = shlex.split(first)
    if words[:2] == ["python", "-c"]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(words[2], "TUTORIAL.md", "exec"), {})
        out = printed.getvalue()
    elif words[0] == "python":
        done = processes.run(folder, *(words[2:] if words[1] == "-m" else words[1:]), seconds=600)
        assert done.status == 0, (command, done.err[-500:])
        out = done.out
    else:
        out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    if rest:
        out = subprocess.run(["bash", "-c", rest], input=out, capture_output=True, text=True,
                             check=True).stdout
    return out


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> list[str]:
    """What the commands of each block print, block after block, as a reader runs them."""
    folder = tmp_path_factory.mktemp("runs")
    return ["".join(run(command, folder) for command in commands_of(block)).replace(
        str(folder / "tutorial"), "runs/tutorial") for block, _ in BLOCKS]


def test_tutorial_is_seven_steps_of_command_notice_exercise_and_answer():
    steps = TEXT.split("\n## ")[1:]
    assert [step[0] for step in steps] == list("1234567")
    for step in steps:
        for part in ("```sh\n", "```text\n", "**Notice.**", "**Exercise.**", "<summary>Answer<"):
            assert part in step, (step[:40], part)


def test_tutorial_has_no_command_outside_of_the_blocks_that_are_run():
    fenced = re.sub(r"```(?:sh|text)\n.*?```", "", TEXT, flags=re.S)
    assert "```" not in fenced and not re.search(r"`(?:python|make) -?\w+[^`]* --", fenced)


def test_tutorial_prints_what_it_says_where_nothing_is_trained(outputs):
    """The alignment, to the letter."""
    certain = [k for k, (block, _) in enumerate(BLOCKS) if "fgrlhf.align" in block]
    assert len(certain) == 1 and outputs[certain[0]] == BLOCKS[certain[0]][1] != ""


def test_tutorial_prints_what_it_says_about_training_in_kind(outputs):
    """Outputs of training: the same words in the same lines, whatever the numbers."""
    words = lambda text: [re.sub(r"-?\d[\d.e+-]*", "#", line).split() for line in text.splitlines()]
    compared = 0
    for (block, said), printed in zip(BLOCKS, outputs):
        if "win-rate" in block or "metrics.jsonl" in block:
            assert words(said) == words(printed), block
            compared += 1
    assert compared == 2


def test_tutorial_explains_every_equation_as_it_says(outputs):
    """The record is sampled, so its tokens differ from machine to machine; the equations do not."""
    labels = lambda text: re.findall(r"^\(\d\)(?: paper)?", text, re.M)
    found = [(labels(said), labels(printed)) for (block, said), printed in zip(BLOCKS, outputs)
             if "explain" in block]
    assert all(said == printed for said, printed in found)
    assert {label[1] for said, _ in found for label in said} == set("1234567")


def test_tutorial_ends_better_than_it_began(outputs):
    """The claim of the last step: above one half, and the KL 0 at the first iteration."""
    assert json.loads(outputs[-1].splitlines()[-1])["win_rate"] > 0.5
    first, *_, last = outputs[-2].splitlines()
    reward = lambda line: float(re.search(r"reward +(\S+)", line)[1])
    assert "KL 0.000" in first.replace("KL -0.000", "KL 0.000") and reward(last) > reward(first)


def test_tutorial_arithmetic_of_the_exercises():
    """The answers that are numbers: step 2's alignment, step 5's r~, step 6's terms."""
    from fgrlhf.align import align
    swapped = align("ab", "ba")
    assert (swapped.distance, swapped.pairs) == (2, [])
    assert [-2 - beta * (-1.2 - -0.2) for beta in (0.5, 2)] == pytest.approx([-1.5, 0])
    assert min(1.3 * 1, 1.2 * 1) == 1.2 and min(1.3 * -1, 1.2 * -1) == -1.3
