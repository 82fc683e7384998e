"""How the project is put together: who may import whom, which packages, what every flag is for."""

import ast
import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"torch", "sentencepiece", "numpy", "tqdm", "pytest"}
RIVALS = {"kernels/bench.py": {"liger_kernel", "trl"},        # measured where they are installed
          "fgrlhf/bench/peers.py": {"transformers"}}
SCRIPTS = ("train_rm.py", "train_ppo.py", "eval.py")
OWN = {"fgrlhf", "kernels", "train_rm", "train_ppo", "eval"}
FILES = sorted([*ROOT.glob("fgrlhf/**/*.py"), *ROOT.glob("kernels/*.py"),
                *(ROOT / name for name in SCRIPTS)])
MODULES = [path for path in FILES if path.name != "__init__.py"]
METHOD = [path for path in ROOT.glob("fgrlhf/*.py") if not path.name.startswith("__")]
# A reader of the method may skip these folders: no file of the method imports from them.
ROOMS = ("bench", "checks", "collect", "compare", "explain", "golden", "plan", "real",
         "reproduce", "simulate")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path, in_functions: bool = True) -> set[str]:
    """Every module a file imports; `from package import module` names the module."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree) if in_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {n for n in names if (ROOT / (n.replace(".", "/") + ".py")).exists()}
            found |= inside or {node.module}
    return found


def closure(path: Path) -> set[Path]:
    """The files of the project that are read when `path` is imported."""
    seen, todo = {path}, [path]
    while todo:
        for module in imports(todo.pop(), in_functions=False):
            file = ROOT / (module.replace(".", "/") + ".py")
            if file.exists() and file not in seen:
                seen.add(file)
                todo.append(file)
    return seen


def packages(path: Path) -> set[str]:
    """The third-party packages a file imports."""
    used = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    return used - RIVALS.get(path.relative_to(ROOT).as_posix(), set()) - {*OWN, "tests"}


# ----- imports ------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", METHOD, ids=lambda path: path.stem)
def test_the_method_imports_from_no_other_room(path):
    rooms = tuple(f"fgrlhf.{room}." for room in ROOMS)
    assert not [name for name in imports(path) if f"{name}.".startswith(rooms)]


@pytest.mark.parametrize("path", sorted(ROOT.glob("fgrlhf/data/*.py")), ids=lambda path: path.stem)
def test_data_imports_nothing_of_the_rest(path):
    own = {name for name in imports(path) if name.split(".")[0] in OWN}
    assert all(name.startswith("fgrlhf.data.") for name in own)


@pytest.mark.parametrize("script", ["train_ppo.py", "train_rm.py", "fgrlhf/sft.py"])
def test_training_imports_no_client_no_page_and_no_graph_decoder(script):
    files = closure(ROOT / script)
    assert not [path for path in files if "collect" in path.parts or path.stem == "graph"]
    used = set().union(*(imports(path, in_functions=False) for path in files))
    assert not used & {"http.client", "http.server", "urllib.request", "socket"}


def test_no_two_modules_import_each_other():
    graph = {name_of(path): {n for n in imports(path, in_functions=False)
                             if n.split(".")[0] in OWN} for path in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name):], name])
        if name in done:
            return
        for other in graph.get(name, ()):
            visit(other, (*above, name))
        done.add(name)
    for name in graph:
        visit(name, ())


def test_only_the_five_packages_and_the_standard_library_are_imported():
    for path in [*MODULES, *ROOT.glob("tests/*.py")]:
        assert packages(path) <= PACKAGES, path
        assert "pytest" not in packages(path) or path.parent.name == "tests", path


def test_kernels_import_torch_only():
    for path in ROOT.glob("kernels/*.py"):
        assert packages(path) <= {"torch"}, path
        assert not {n for n in imports(path) if n.split(".")[0] in OWN - {"kernels"}}, path


def test_requirements_pin_the_five_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in lines} == PACKAGES
    assert all("==" in line for line in lines)


# ----- habits -------------------------------------------------------------------------------------

def test_every_module_says_what_it_is():
    silent = [path for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_no_line_is_longer_than_100_columns():
    long = [f"{path.relative_to(ROOT)}:{number}" for path in [*FILES, *ROOT.glob("tests/*.py")]
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
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
    """The dataclass of every command."""
    found = []
    for path in MODULES:
        if "__main__" in path.read_text():
            module = importlib.import_module(name_of(path))
            found += [pytest.param(value, id=f"{name_of(path)}.{name}")
                      for name, value in vars(module).items()
                      if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
                      and (name == "Config" or name.endswith("Config"))
                      and any("help" in field.metadata for field in dataclasses.fields(value))]
    return found


def reads(path: Path, *names: str) -> set[str]:
    """The attributes that a file reads from its configuration, and from other `names`."""
    return {node.attr for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and ast.unparse(node.value) in ("config", "self.config", "self.options", "options",
                                            *names)}


@pytest.mark.parametrize("config", configs())
def test_every_flag_is_read(config):
    """In the module of the configuration, or where the project hands the whole of it."""
    own = ROOT / (config.__module__.replace(".", "/") + ".py")
    handed = [path for path in closure(own) if path.parent.name in ("engine", "checks", "collect")]
    read = reads(own, "self").union(*map(reads, handed))
    assert {field.name for field in dataclasses.fields(config)} - read == set()


def test_every_script_is_found_to_have_flags():
    ids = {parameter.id for parameter in configs()}
    assert {"train_rm.Config", "train_ppo.Config", "fgrlhf.sft.Config", "fgrlhf.generate.Config",
            "eval.OutputsConfig", "eval.WinRateConfig", "eval.RewardModelConfig",
            "fgrlhf.simulate.__main__.WorldConfig"} <= ids
