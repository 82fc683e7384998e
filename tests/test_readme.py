"""The pages against the code: every `file:name`, link, command, flag and metric they name."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fgrlhf.__main__ import commands as listed
from fgrlhf.engine.config import parser
from fgrlhf.golden.__main__ import cases
from fgrlhf.reproduce import table
from tests.test_layout import OWN, ROOT, configs

PAGES = sorted([ROOT / "README.md", *ROOT.glob("fgrlhf/**/*.md"), *ROOT.glob("kernels/*.md"),
                *ROOT.glob("tests/*.md")])
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
MAP = TEXTS["fgrlhf/README.md"]
GLOSSARY = TEXTS["fgrlhf/engine/README.md"]


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def found_in(pattern: str) -> list:
    """(page, match) of a pattern with one or two groups, on every page."""
    return sorted({(page, match) for page, text in TEXTS.items()
                   for match in re.findall(pattern, text)})


# ----- code ---------------------------------------------------------------------------------------

def names_in(path: Path) -> set[str]:
    """The top-level functions and classes of a module."""
    return {node.name for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("page, row", found_in(r"`([\w/]+\.py:\w+)`"))
def test_pages_name_code_that_exists(page, row):
    path, name = row.split(":")
    assert name in names_in(ROOT / path)


@pytest.mark.parametrize("page, path", found_in(r"`((?:tests|kernels|fgrlhf)/[\w/]+\.\w+)`"))
def test_pages_name_files_that_exist(page, path):
    assert (ROOT / path).is_file()


def test_the_package_names_every_room_and_every_file_of_the_method():
    tree = MAP.split("```")[1]
    rooms = {path.parent.name for path in ROOT.glob("fgrlhf/*/__init__.py")}
    files = {path.name for path in ROOT.glob("fgrlhf/*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"\b(\w+)/", tree)) == rooms
    assert set(re.findall(r"\b\w+\.py\b", tree)) == files


# ----- the map ------------------------------------------------------------------------------------

def map_rows() -> list[list[str]]:
    """The cells of each row of the map."""
    text = MAP.split("## The map")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")]
            for line in text.splitlines() if line.startswith("| ")]
    return rows[2:]


def code_of(row: list[str]) -> list[tuple[str, str]]:
    return re.findall(r"`([\w/]+\.py):(\w+)`", " ".join(row))


@pytest.mark.parametrize("number", range(1, 8))
def test_map_and_reading_order_have_each_equation(number):
    rows = [row for row in map_rows() if row[1].startswith(f"({number})")]
    assert rows and code_of(rows[0])
    order = TEXTS["README.md"].split("## Read the method in this order")[1].split("\n## ")[0]
    assert f"**({number})**" in order


def test_map_has_a_function_of_every_kernel():
    named = {path for row in map_rows() for path, _ in code_of(row)}
    kernels = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    others = {f"kernels/{name}.py" for name in ("__init__", "bench", "timing", "memory")}
    assert kernels - others <= named


@pytest.mark.parametrize("row", map_rows(), ids=lambda row: row[0])
def test_map_names_tests_that_use_the_code_of_their_row(row):
    """Every test file uses something of the row; every function's module is tested by one."""
    tests = {path: (ROOT / path).read_text() for path in re.findall(r"`(tests/\w+\.py)`", row[3])}
    assert tests and code_of(row)

    def module(path: str) -> str:
        return Path(path).parent.name if path.endswith("__main__.py") else Path(path).stem
    for path, text in tests.items():
        assert any(module(code) in text for code, _ in code_of(row)), path
    for code, _ in code_of(row):
        assert any(module(code) in text for text in tests.values()), code


def test_map_names_every_golden_case_and_no_other():
    named = {name for row in map_rows() for name in re.findall(r"`([\w-]+)`", row[4])}
    assert named == {case.name.removesuffix("-one-token") for case in cases()}


def test_the_rules_are_ten():
    rules = MAP.split("## Ten rules")[1].split("\n## ")[0]
    assert re.findall(r"^(\d+)\. ", rules, re.M) == [str(n) for n in range(1, 11)]


# ----- links --------------------------------------------------------------------------------------

def anchors(text: str) -> set[str]:
    """The anchors that a Markdown page's headings get."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", without_blocks(TEXTS[page])):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there.read_text()), target


def test_the_main_page_links_to_every_other_page():
    links = set(re.findall(r"\]\(([^)#]+)", TEXTS["README.md"]))
    assert set(TEXTS) - {"README.md"} <= links


# ----- commands and flags -------------------------------------------------------------------------

def config_of(words: list[str]) -> type | None:
    """The dataclass behind `python -m fgrlhf.sft ...`, `python eval.py outputs ...`."""
    name = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
    if name.split(".")[0] not in OWN:
        return None
    rest = words[2 + (words[1] == "-m"):]
    if (ROOT / name.replace(".", "/") / "__main__.py").exists():
        name += ".__main__"
    module = importlib.import_module(name)
    wanted = rest[0].replace("-", "").lower() + "config" if rest else ""
    own = next((value for key, value in vars(module).items() if key.lower() == wanted), None)
    return own or getattr(module, "Config", None)


def commands_of(text: str) -> list[list[str]]:
    """Every Python command of a page, in blocks and in the text, as words."""
    blocks = re.findall(r"python (?:-m )?[\w./]+(?:[^\n`|]|\\\n)*", text.replace("\\\n", " "))
    return [shlex.split(block, comments=True) for block in blocks if '"' not in block
            or block.count('"') % 2 == 0]


@pytest.mark.parametrize("page, words", [(page, words) for page, text in TEXTS.items()
                                         for words in commands_of(text)],
                         ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_commands_use_flags_that_exist(page, words):
    if words[1] == "-c" or not words[-1]:
        return
    config = config_of(words)
    if config is not None and "--report" not in words:         # the other form of collect
        flags = {word for word in words if word.startswith("--")}
        assert flags <= set(parser(config)._option_string_actions)


def all_flags() -> set[str]:
    flags = {"--report"}
    for parameter in configs():
        flags |= set(parser(parameter.values[0])._option_string_actions)
    return flags


OTHERS = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--help",  # torchrun
          "--clock", "--repeats", "--json", "--device", "--profile", "--matmuls", "--work",
          "--width", "--only", "--peers"}                                   # the benchmarks' own


@pytest.mark.parametrize("page", TEXTS)
def test_pages_name_no_flag_that_no_command_has(page):
    """In the text and the tables, outside of commands."""
    named = set(re.findall(r"`[^`\n]*?(--[a-z][\w-]*)", without_blocks(TEXTS[page])))
    assert named - all_flags() - OTHERS == set()


def test_the_list_of_commands_names_them_all():
    done = subprocess.run([sys.executable, "-m", "fgrlhf"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == len(list(listed()))
    named = {command for command, _ in listed()}
    there = {f"python -m fgrlhf.{path.parent.name}" for path in ROOT.glob("fgrlhf/*/__main__.py")}
    there |= {"python -m fgrlhf.checkpoint",
              "python -m fgrlhf.dpo", "python -m fgrlhf.simulate.advantages",
              "python -m fgrlhf.real.files", "python -m fgrlhf.real.judge",
              "python -m fgrlhf.real.analysis", "python -m fgrlhf.real.probes",
              "python -m fgrlhf.real.prompts"}
    assert there | {"python train_rm.py", "python train_ppo.py", "python eval.py",
                    "python -m fgrlhf.sft", "python -m fgrlhf.generate"} == named


def test_porting_commands_end_as_their_page_says(tmp_path):
    text = TEXTS["fgrlhf/golden/README.md"]
    block = next(part for part in text.split("```") if "fgrlhf.golden write" in part)
    last = None
    for line in block.strip().splitlines():
        words = line.split("#")[0].replace("runs/golden", str(tmp_path / "golden")).split()
        if words[:1] == ["python"]:
            last = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True,
                                  text=True)
            assert last.returncode == 0, last.stderr
    assert f"{last.stdout.splitlines()[-1]}" in text


# ----- the glossary -------------------------------------------------------------------------------

def test_glossary_has_every_metric_that_is_logged():
    logged = set()
    for name in ("train_rm.py", "train_ppo.py", "fgrlhf/sft.py", "fgrlhf/ppo.py",
                 "fgrlhf/simulate/oracle.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"(sft|rm|rollout|ppo|eval)/\w+", node.value):
                    logged.add(node.value)
    assert len(logged) > 15
    assert not {name for name in logged if f"`{name}" not in GLOSSARY}


def test_glossary_has_every_column_of_the_tables():
    columns = [value for value in vars(table).values() if isinstance(value, table.Column)]
    columns += [c for value in vars(table).values() if isinstance(value, tuple)
                for c in value if isinstance(c, table.Column)]
    assert len(columns) > 8
    assert not {c.header for c in columns if f"`{c.header}`" not in GLOSSARY}
