"""The README against the code: every `file:name`, flag, metric and path it names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fgrlhf.config import parser
from fgrlhf.golden import cases
from tests.test_layout import ROOT

TEXT = (ROOT / "README.md").read_text()


def names_in(path: Path) -> set[str]:
    """Top-level functions, classes and assignments of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return names


@pytest.mark.parametrize("row", sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", TEXT))))
def test_readme_map_names_code_that_exists(row):
    path, name = row
    assert name in names_in(ROOT / path)


@pytest.mark.parametrize("path", sorted(set(re.findall(
    r"`((?:tests|kernels|fgrlhf)/[\w/]+\.py)`", TEXT))))
def test_readme_files_exist(path):
    assert (ROOT / path).is_file()


def test_readme_file_tree_names_files_that_exist():
    tree = TEXT.split("```\nfgrlhf/ ")[1].split("```")[0]
    folder = "fgrlhf"
    for line in tree.splitlines():
        for word in line.split():
            if word in ("kernels/", "train_rm.py"):
                folder = word.rstrip("/") if word.endswith("/") else "."
            elif word.endswith((".py", "/")):
                assert (ROOT / folder / word).exists(), word


def test_readme_covers_every_kernel():
    for path in (ROOT / "kernels").glob("*.py"):
        if path.name != "__init__.py":
            assert path.name in TEXT, path.name


def test_readme_map_names_every_fixture_and_no_other():
    table = TEXT.split("| test | fixture |\n")[1].split("\n\n")[0]
    cells = [line.split("|")[5] for line in table.splitlines()]
    named = {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}
    assert named == {case.name.removesuffix("-one-token") for case in cases()}


def test_readme_porting_commands_end_as_it_says(tmp_path):
    text = TEXT.split("## Porting")[1].split("\n## ")[0]
    last = None
    for line in text.split("```")[1].strip().splitlines():
        words = line.split("#")[0].replace("runs/golden", str(tmp_path / "golden")).split()
        last = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert last.returncode == 0, last.stderr
    assert f"`{last.stdout.splitlines()[-1]}`" in text
    files = [path for path in (tmp_path / "golden").rglob("*.*") if "outputs" not in path.parts]
    assert f"{len(files)} files, {sum(p.stat().st_size for p in files) / 1000:.0f} KB" in text


def test_readme_glossary_has_every_metric_that_is_logged():
    glossary = TEXT.split("## Metrics")[1].split("\n## ")[0]
    logged = set()
    for name in ("train_rm.py", "train_ppo.py", "fgrlhf/sft.py", "fgrlhf/judge.py",
                 "fgrlhf/monitor.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"(sft|rm|rollout|ppo|eval)/\w+", node.value):
                    logged.add(node.value)
    assert len(logged) > 15
    assert not {name for name in logged if f"`{name}" not in glossary}


def flags_of(command: str) -> set[str]:
    """Every flag of one of the project's commands."""
    import eval as evaluation
    import train_ppo
    import train_rm
    from fgrlhf import collect, reproduce, sft
    configs = {"train_rm.py": train_rm.Config, "train_ppo.py": train_ppo.Config,
               "fgrlhf.sft": sft.Config, "fgrlhf.collect --pairs": collect.Config,
               "fgrlhf.reproduce": reproduce.Config,
               "eval.py outputs": evaluation.OutputsConfig, "win-rate": evaluation.WinRateConfig,
               "reward-model": evaluation.RewardModelConfig}
    config = next((config for name, config in configs.items() if name in command), None)
    return None if config is None else set(parser(config)._option_string_actions)


def test_readme_commands_use_flags_that_exist():
    checked = 0
    for command in re.findall(r"python (?:-m )?[^\n`]*(?:\\\n[^\n`]*)*", TEXT):
        flags = flags_of(command)
        if flags is not None:
            checked += 1
            assert set(re.findall(r"(--[\w-]+)", command)) <= flags, command
    assert checked >= 6
