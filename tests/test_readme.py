"""The README against the code: every `file:name`, flag, metric and path it names."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fgrlhf.config import parser
from fgrlhf.golden import cases
from fgrlhf.reporting import table
from tests.test_layout import ROOT, configs

TEXT = (ROOT / "README.md").read_text()


def names_in(path: Path) -> set[str]:
    """Top-level functions and classes of a module."""
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


def test_readme_file_tree_names_every_module_and_no_other():
    tree, folder, named = TEXT.split("```\nfgrlhf/ ")[1].split("```")[0], "fgrlhf", set()
    for word in tree.split():
        folder = {"kernels/": "kernels", "train_rm.py": "."}.get(word, folder)
        if word.endswith((".py", "/")) and word != "kernels/":
            named.add(ROOT / folder / word)
    there = {path for pattern in ("*.py", "fgrlhf/*.py", "kernels/*.py")
             for path in ROOT.glob(pattern) if path.name != "__init__.py"}
    assert there == {path for path in named if path.suffix}
    assert all(path.exists() for path in named)


def test_readme_covers_every_kernel():
    for path in (ROOT / "kernels").glob("*.py"):
        if path.name != "__init__.py":
            assert path.name in TEXT, path.name


def test_readme_map_names_every_fixture_and_no_other():
    rows = TEXT.split("| test | fixture |\n")[1].split("\n\n")[0]
    cells = [line.split("|")[5] for line in rows.splitlines()]
    named = {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}
    assert named == {case.name.removesuffix("-one-token") for case in cases()}


def test_readme_porting_commands_end_as_it_says(tmp_path):
    text = TEXT.split("## Porting")[1].split("\n## ")[0]
    last = None
    for line in text.split("```")[1].strip().splitlines():
        words = line.split("#")[0].replace("runs/golden", str(tmp_path / "golden")).split()
        last = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True,
                              text=True)
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


# ----- the map ------------------------------------------------------------------------------------

def map_rows() -> list[list[str]]:
    """The cells of each row of the map."""
    text = TEXT.split("## The map")[1].split("| symbol |")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")]
            for line in text.splitlines() if line.startswith("| ")]
    return rows[2:]


def code_of(row: list[str]) -> list[tuple[str, str]]:
    return re.findall(r"`([\w/]+\.py):(\w+)`", " ".join(row))


@pytest.mark.parametrize("number", range(1, 8))
def test_readme_map_has_a_row_for_each_equation(number):
    rows = [row for row in map_rows() if row[1].startswith(f"({number})")]
    assert rows and code_of(rows[0])


def test_readme_map_has_a_function_of_every_kernel():
    named = {path for row in map_rows() for path, _ in code_of(row)}
    kernels = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    others = {f"kernels/{name}.py" for name in ("__init__", "bench", "timing", "memory")}
    assert kernels - others <= named


@pytest.mark.parametrize("row", map_rows(), ids=lambda row: row[0])
def test_readme_map_names_tests_that_touch_the_code_of_their_row(row):
    """Every test file uses something of the row; every function's module is tested by one."""
    tests = {path: (ROOT / path).read_text() for path in re.findall(r"`(tests/\w+\.py)`", row[3])}
    assert tests and code_of(row)
    stem = lambda path: Path(path).stem
    for path, text in tests.items():
        assert any(stem(code) in text for code, _ in code_of(row)), path
    for code, _ in code_of(row):
        assert any(stem(code) in text for text in tests.values()), code


# ----- links and flags ----------------------------------------------------------------------------

def anchors(text: str) -> set[str]:
    """The anchors that a Markdown page's headings get."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "TUTORIAL.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            assert not path or (ROOT / path).exists(), target
            assert not anchor or anchor in anchors((ROOT / (path or page)).read_text()), target


def config_of(words: list[str]) -> type | None:
    """The dataclass behind `python -m fgrlhf.sft ...`, `python eval.py outputs ...`."""
    name = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
    rest = words[2 + (words[1] == "-m"):]
    module = importlib.import_module(name)
    if hasattr(module, "Config"):
        return module.Config
    wanted = rest[0].replace("-", "").lower() + "config"
    return next((value for key, value in vars(module).items() if key.lower() == wanted), None)


def commands() -> list[list[str]]:
    """Every Python command of the README, in blocks and in the text, as words."""
    blocks = re.findall(r"python (?:-m )?[\w./]+(?:[^\n`]|\\\n)*", TEXT.replace("\\\n", " "))
    return [shlex.split(block, comments=True) for block in blocks]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_readme_commands_use_flags_that_exist(words):
    config = config_of(words)
    if config is not None and "--report" not in words:          # collect.py's other form, no field
        flags = {word for word in words if word.startswith("--")}
        assert flags <= set(parser(config)._option_string_actions)


def test_readme_shows_the_commands_it_should():
    shown = {" ".join(words[1:3]) for words in commands()}
    assert {"-m fgrlhf.sft", "-m fgrlhf.explain", "-m fgrlhf.reproduce", "-m fgrlhf.generate",
            "eval.py outputs", "eval.py win-rate"} <= shown
    assert {"train_rm.py", "train_ppo.py"} <= {words[1] for words in commands()}


def test_readme_names_no_flag_that_no_command_has():
    """In the text and the tables, outside of commands."""
    flags = set()
    for parameter in configs():
        path, node = parameter.values
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        flags |= set(parser(getattr(module, node.name))._option_string_actions)
    named = set(re.findall(r"`[^`\n]*?(--[a-z][\w-]*)", re.sub(r"```.*?```", "", TEXT, flags=re.S)))
    assert len(named) > 10 and named - flags <= {"--report"}    # collect.py's other form


# ----- the glossary -------------------------------------------------------------------------------

def test_readme_glossary_has_every_column_of_the_tables():
    glossary = TEXT.split("## Metrics")[1].split("\n## ")[0]
    columns = [value for value in vars(table).values() if isinstance(value, table.Column)]
    columns += [c for value in vars(table).values() if isinstance(value, tuple)
                for c in value if isinstance(c, table.Column)]
    assert len(columns) > 8
    assert not {c.header for c in columns if f"`{c.header}`" not in glossary}
