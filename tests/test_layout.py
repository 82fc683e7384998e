"""How the project is put together: who may import whom, which packages, what every flag is for."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"torch", "sentencepiece", "numpy", "tqdm", "pytest"}
RIVALS = {"kernels/bench.py": {"liger_kernel", "trl"}}        # measured beside ours where installed
# One tuple a rank; inside a rank from left to right. A module imports only from what stands before
# its own group, and from any kernel.
RANKS = (
    ("config align padding", "fields", "files", "tokenizer edits", "readers",
     "collecting.change collecting.tasks collecting.lines collecting.protocol collecting.ambiguity",
     "collecting.store collecting.cache",
     "collecting.segments collecting.desk collecting.web collecting.client",
     "collecting.human collecting.llm collecting.agreement"),
    ("encode model", "lora graph", "distributed"),
    ("safetensors layouts.stored", "layouts.huggingface_tokenizer layouts.llama2c layouts.meta",
     "layouts.huggingface", "checkpoint world", "simulate"),
    ("states shards", "rollout run optimizer", "reward"),
    ("advantage ppo floor", "worked monitor replay rules"),
    ("evaluate reporting.markup reporting.table reporting.equations",
     "judge results reporting.chart reporting.excerpts reporting.worked_text",
     "reporting.worked_page", "report"),
    ("sft generate plan pipeline train_rm explain", "checks", "players", "train_ppo",
     "eval reproduce collect bench"),
    ("fixtures.case fixtures.compare",
     "fixtures.text fixtures.transformer fixtures.preference fixtures.advantage",
     "fixtures.alignment fixtures.likelihood", "fixtures.policy", "golden"),
)
KERNELS = ("three_matmuls clipped_surrogate token_preference timing memory", "linear_logp exact_kl",
           "linear_ppo linear_cross_entropy", "bench")
HANDED_TO = {"Run": "fgrlhf/run.py", "optimise": "fgrlhf/players.py"}      # with the whole Config
SCRIPTS = ("train_rm", "train_ppo", "eval")
OWN = {"fgrlhf", "kernels", *SCRIPTS}
FILES = sorted([*ROOT.glob("fgrlhf/**/*.py"), *ROOT.glob("kernels/*.py"),
                *(ROOT / f"{s}.py" for s in SCRIPTS)])
MODULES = [path for path in FILES if path.name != "__init__.py"]


def ladder() -> dict[str, int]:
    """Module -> its rung. kernels are below everything."""
    rungs = [["kernels." + name for name in group.split()] for group in KERNELS]
    rungs += [[name if name in SCRIPTS else "fgrlhf." + name for name in group.split()]
              for rank in RANKS for group in rank]
    return {name: number for number, rung in enumerate(rungs) for name in rung}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def packages(path: Path) -> set[str]:
    """The third-party packages a file imports."""
    used = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    rivals = RIVALS.get(path.relative_to(ROOT).as_posix(), set())
    return used - rivals - {*OWN, "tests"}


def imports(path: Path) -> set[str]:
    """Every module a file imports, in functions too; `from package import module` names both."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {n for n in names if (ROOT / (n.replace(".", "/") + ".py")).exists()}
            found |= inside or {node.module}
    return found


def test_every_module_imports_only_from_lower_ranks():
    rungs, wrong = ladder(), []
    for path in MODULES:
        name = module_name(path)
        assert name in rungs, f"{name} has no rank: give it one in tests/test_layout.py"
        for other in imports(path):
            if other.split(".")[0] in OWN and not rungs.get(other, 99) < rungs[name]:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_only_the_five_packages_and_the_standard_library_are_imported():
    for path in [*MODULES, *ROOT.glob("tests/*.py")]:
        assert packages(path) <= PACKAGES, path
        assert "pytest" not in packages(path) or path.parent.name == "tests", path


def test_kernels_import_torch_alone():
    for path in ROOT.glob("kernels/*.py"):
        assert packages(path) <= {"torch"}, path


def test_requirements_pin_the_five_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in lines} == PACKAGES
    assert all("==" in line for line in lines)


def test_init_files_are_empty():
    inits = [path for path in FILES if path.name == "__init__.py"]
    assert inits and all(path.read_bytes() == b"" for path in inits)


def test_every_module_says_what_it_is():
    silent = [path for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_no_line_is_longer_than_100_columns():
    long = [f"{path.relative_to(ROOT)}:{number}" for path in [*FILES, *ROOT.glob("tests/*.py")]
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not long


def test_no_function_is_longer_than_60_lines():
    """Decorators aside, from `def` to the last line; tests are free to be as long as they need."""
    long = [f"{path.relative_to(ROOT)}:{node.lineno} {node.name}" for path in MODULES
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno - node.lineno > 60]
    assert not long


def test_nothing_unpickles_code():
    """Every torch.load is weights_only; pickle itself is never called."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True"
                           for k in node.keywords), path
            assert called not in ("pickle.load", "pickle.loads", "eval", "exec"), path


# ----- flags --------------------------------------------------------------------------------------

def configs() -> list:
    """(file, class node) of every dataclass whose fields are made by config.arg."""
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and path.name != "config.py" and any(
                    isinstance(s, ast.AnnAssign) and isinstance(s.value, ast.Call)
                    and ast.unparse(s.value.func) == "arg" for s in node.body):
                found.append(pytest.param(path, node, id=f"{path.stem}.{node.name}"))
    return found


def reads(tree: ast.AST, of: set[str]) -> set[str]:
    """Attributes read from the names in `of`."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) in of}


@pytest.mark.parametrize("path, config", configs())
def test_every_field_of_a_config_is_read(path, config):
    """In a function that takes `config: ThatConfig`, or by the module it is handed to."""
    tree, read = ast.parse(path.read_text()), set()
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        names = {a.arg for a in function.args.args if a.annotation
                 and ast.unparse(a.annotation) == config.name}
        if names:
            read |= reads(function, names)
            called = {ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)}
            for name in called & HANDED_TO.keys():
                read |= reads(ast.parse((ROOT / HANDED_TO[name]).read_text()), {"config"})
    fields = {s.target.id for s in config.body if isinstance(s, ast.AnnAssign)}
    assert fields - read == set()


def test_every_script_is_found_to_have_a_config():
    stems = {parameter.id for parameter in configs()}
    assert {"train_rm.Config", "train_ppo.Config", "sft.Config", "generate.Config",
            "eval.OutputsConfig",
            "eval.WinRateConfig", "eval.RewardModelConfig", "simulate.WorldConfig"} <= stems
