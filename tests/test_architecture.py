"""The import flow and the other rules of the code that its syntax trees can show."""

import ast
from functools import cache
from pathlib import Path

import pytest

from samplers import SAMPLERS

ROOT = Path(__file__).resolve().parent.parent
# Imports flow from left to right; the parts of one layer do not know each other.
LAYERS = (("utils",), ("components",), ("models", "dataLoader", "samplers"), ("opt",), ("train",), ("run",))
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
PACKAGES = ("utils", "components", "models", "dataLoader", "samplers")
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for part in LAYER
    for path in ([ROOT / f"{part}.py"] if (ROOT / f"{part}.py").is_file() else (ROOT / part).rglob("*.py"))
)
PACKAGE_SOURCES = [source for source in SOURCES if source.split("/")[0] in PACKAGES]
# What no module of this repository may need: text run as code, and a shell that interprets text.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
UNSAFE_LOADS = {"pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"}


@cache
def tree(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"), source)


def own_part(source: str) -> str:
    return source.split("/")[0].removesuffix(".py")


def imported_modules(module: ast.Module, source: str) -> list[tuple[int, str]]:
    """(line, module) of every import, those inside functions too; relative ones made absolute."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.lineno, node.module))
        elif isinstance(node, ast.ImportFrom):
            package = source.split("/")[: -node.level]
            found += [(node.lineno, ".".join([*package, node.module or alias.name])) for alias in node.names]
        elif is_import_by_name(node) and isinstance(node.args[0], ast.Constant):
            found.append((node.lineno, node.args[0].value))
    return found


def is_import_by_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module"


def flow_faults(module: ast.Module, source: str) -> list[str]:
    """Imports of this repository's own parts that are neither the module's own package nor to the left of it."""
    own = own_part(source)
    return [
        f"{source}:{line} imports {name}"
        for line, name in imported_modules(module, source)
        if (part := name.split(".")[0]) in LAYER and part != own and LAYER[part] >= LAYER[own]
    ]


def call_faults(module: ast.Module, source: str) -> list[str]:
    """Calls that run text or unpickle objects."""
    faults = []
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = (
            name in FORBIDDEN_CALLS | UNSAFE_LOADS
            or (is_import_by_name(node) and not isinstance(node.args[0], ast.Constant))
            or options.get("shell", "False") != "False"
            or (name.endswith("torch.load") and options.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False")
        )
        if unsafe:
            faults.append(f"{source}:{node.lineno} calls {name}")
    return faults


def undocumented(module: ast.Module, source: str) -> list[str]:
    """The module, its public functions and classes that have no docstring."""
    definitions = [n for n in module.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    named = [(source, module), *((f"{source}: {n.name}", n) for n in definitions if not n.name.startswith("_"))]
    return [name for name, node in named if not ast.get_docstring(node)]


def method(module: ast.Module, class_name: str, name: str) -> ast.FunctionDef:
    """A method of a class, which must be there."""
    body = next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == class_name).body
    return next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)


def knowledge_of_strategies(function: ast.FunctionDef, strategies: set[str]) -> list[str]:
    """Names of strategies, questions for a type, and the option that names the strategy, in a function."""
    faults = []
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) and node.value in strategies:
            faults.append(f"line {node.lineno}: {node.value!r}")
        if isinstance(node, ast.Name) and node.id in ("isinstance", "issubclass", "type", "hasattr", "getattr"):
            faults.append(f"line {node.lineno}: {node.id}")
        if isinstance(node, ast.Attribute) and node.attr in ("strategy", "__class__"):
            faults.append(f"line {node.lineno}: .{node.attr}")
    return faults


def strategies() -> set[str]:
    """The names in the registry, and the published strategies, whether they are there yet or not."""
    return {"full", "soft", "expansive", "egra", *SAMPLERS}


def test_every_part_of_the_repository_is_looked_at():
    assert {own_part(source) for source in SOURCES} == set(LAYER)


@pytest.mark.parametrize("source", SOURCES)
def test_imports_flow_one_way(source):
    assert flow_faults(tree(source), source) == []


@pytest.mark.parametrize("source", SOURCES)
def test_no_star_imports(source):
    stars = [n for n in ast.walk(tree(source)) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
    assert [f"{source}:{node.lineno}" for node in stars] == []


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "run.py"])
def test_only_the_scripts_print(source):
    calls = [n for n in ast.walk(tree(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]
    assert [f"{source}:{node.lineno}" for node in calls] == []


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_runs_text_or_unpickles_objects(source):
    assert call_faults(tree(source), source) == []


@pytest.mark.parametrize("source", PACKAGE_SOURCES)
def test_what_is_public_has_a_docstring(source):
    assert undocumented(tree(source), source) == []


@pytest.mark.parametrize("name", ["step", "train"])
def test_the_training_loop_knows_no_strategy(name):
    assert knowledge_of_strategies(method(tree("train.py"), "Trainer", name), strategies()) == []


# --- the rules themselves find what they forbid ---
@pytest.mark.parametrize(
    ("source", "text", "faulty"),
    [
        ("utils/a.py", "import components.types", True),
        ("utils/a.py", "from utils import b", False),
        ("components/a.py", "from utils.errors import UserError", False),
        ("components/a.py", "def f():\n    from models import build_field", True),
        ("models/a.py", "import samplers", True),
        ("samplers/a.py", "import dataLoader.demo as demo", True),
        ("dataLoader/a.py", "from models.kernels import select", True),
        ("models/kernels/a.py", "from ..field import Field", False),
        ("models/kernels/a.py", "from ...train import Trainer", True),
        ("models/a.py", "from .. import run", True),
        ("models/a.py", "import opt", True),
        ("models/a.py", "importlib.import_module('samplers.soft')", True),
        ("models/a.py", "importlib.import_module('triton')", False),
        ("opt.py", "import train", True),
        ("train.py", "import opt, samplers, models, dataLoader", False),
        ("train.py", "if True:\n    import run", True),
        ("run.py", "import train, numpy", False),
    ],
)
def test_the_flow_rule_tells_right_imports_from_wrong_ones(source, text, faulty):
    assert bool(flow_faults(ast.parse(text), source)) == faulty


@pytest.mark.parametrize(
    ("text", "faulty"),
    [
        ("eval('1')", True),
        ("field.eval()", False),
        ("exec(text)", True),
        ("os.system('ls')", True),
        ("subprocess.run('ls', shell=True)", True),
        ("subprocess.run(['ls'])", False),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("pickle.loads(text)", True),
        ("importlib.import_module(name)", True),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path, allow_pickle=False)", False),
    ],
)
def test_the_rule_of_calls_tells_safe_from_unsafe(text, faulty):
    assert bool(call_faults(ast.parse(text), "x.py")) == faulty


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ('"""M."""\ndef f():\n    """F."""\nclass C:\n    """C."""', 0),
        ('"""M."""\ndef _f(): pass', 0),
        ("x = 1", 1),
        ('"""M."""\ndef f(): pass\nclass C: pass', 2),
    ],
)
def test_the_docstring_rule_counts_what_is_missing(text, missing):
    assert len(undocumented(ast.parse(text), "x.py")) == missing


@pytest.mark.parametrize(
    "line", ["if o.strategy == x: pass", "x == 'soft'", "isinstance(self.sampler, Soft)", "type(self.sampler)"]
)
def test_the_loop_rule_finds_every_way_to_ask_for_a_strategy(line):
    function = ast.parse(f"def step(self):\n    {line}").body[0]
    assert knowledge_of_strategies(function, strategies())
