"""The house rules that a reader cannot see by looking at one file: who may import whom, and what no file may name.

`violations` judges one module's source; it is tested on planted sources first, then run over every module there is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module of `qruntime` imports from its own layer and those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("request",),
    ("device",),
    ("ops",),
    ("quant",),
    ("models",),
    ("checkpoint",),
    ("memory",),
    ("prompt", "schedule", "sampling", "media", "events"),
    ("draft",),
    ("pipeline",),
    ("demonstrate",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
PUBLIC_NAMES = {"pipeline", "request"}  # what qruntime/__init__.py resolves, inside functions or for type checkers
REFERENCES = {"transformers", "diffusers", "bitsandbytes", "optimum", "accelerate"}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
UNSAFE_NAMES = {"eval", "exec", "torch.load", "numpy.load"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"}
DEVICE_MODULES = ("torch.cuda", "torch.mps")
DYNAMIC_IMPORTS = {"__import__", "importlib.import_module", "runpy.run_module", "runpy.run_path"}


def violations(module: str, source: str) -> list[str]:
    """Each rule that `source`, the text of the module with this dotted name, breaks, as `line: rule`.

    Packages are named by their `__init__`: `qruntime.ops.__init__`.
    """
    tree = ast.parse(source)
    found = [*_import_violations(module, tree), *_name_violations(module, tree)]
    return [f"{line}: {rule}" for line, rule in sorted(set(found))]


def _import_violations(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    home = module.split(".", maxsplit=1)[0]
    in_convert = home == "convert"
    for node, target, lazy in _imports(module, tree):
        line = node.lineno
        top = target.split(".", maxsplit=1)[0]
        if not target:
            yield line, "a module named at run time is imported"
        elif isinstance(node, ast.ImportFrom) and node.level and top != home:
            yield line, "a relative import leaves its package"
        elif top == "convert" or _is_within(target, "qruntime.convert"):
            if in_convert and _is_absolute(node):
                yield line, f"{target}: convert imports itself relatively"
            elif not in_convert and not (module == "qruntime.cli" and lazy and top == "qruntime"):
                yield line, f"{target}: only cli.py imports qruntime.convert, by that name and inside a function"
        elif top == "benchmarks":
            yield line, f"{target}: nothing that is installed imports benchmarks"
        elif top in REFERENCES and not (module == "convert.stock" and lazy):
            yield line, f"{target}: only convert/stock.py imports the reference and its peers, inside a function"
        elif top in UNSAFE_MODULES:
            yield line, f"{target}: can run code from a file"
        elif top == "qruntime" and not in_convert:
            yield from ((line, rule) for rule in _arrow_violations(module, target, lazy))


def _arrow_violations(module: str, target: str, lazy: bool) -> Iterator[str]:
    importer, imported = module.split(".")[1], (target + ".").split(".")[1]
    if imported == "__version__":
        return
    if imported not in RANK:
        yield f"{target}: is no module with a place in LAYERS"
    elif importer == "__init__":
        if imported not in PUBLIC_NAMES or not lazy:
            yield f"{target}: qruntime/__init__.py resolves public names only, lazily"
    elif importer not in RANK:
        yield f"{module}: has no place in LAYERS"
    elif RANK[imported] > RANK[importer]:
        yield f"{importer} imports {imported}, which comes after it"


def _name_violations(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node, name in _names(tree):
        if module != "qruntime.device" and any(_is_within(name, device) for device in DEVICE_MODULES):
            yield node.lineno, f"{name}: only device.py names a device's module"
        if name in UNSAFE_NAMES:
            yield node.lineno, f"{name}: can run code from a file"
        if any(_is_within(name, variable) for variable in ENVIRONMENT):
            yield node.lineno, f"{name}: no environment variables"
        if name == "print" and module.startswith("qruntime.") and module != "qruntime.cli":
            yield node.lineno, "print: only cli.py talks to the user"


def _imports(module: str, tree: ast.Module) -> Iterator[tuple[ast.stmt | ast.Call, str, bool]]:
    """Every import: its node, the full name of what it brings, and whether it runs on demand only.

    `from package import name` counts as `package.name`, which is right for submodules and harmless for the rest.
    """
    lazy_nodes = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(outer)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        lazy = node in lazy_nodes
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            package = _resolve(module, node.level, node.module)
            for alias in node.names:
                yield node, f"{package}.{alias.name}", lazy
    for node, name in _names(tree):
        if name in DYNAMIC_IMPORTS and isinstance(node, ast.Call):
            argument = node.args[0] if node.args else None
            text = argument.value if isinstance(argument, ast.Constant) else None
            level = len(text) - len(text.lstrip(".")) if isinstance(text, str) else 0
            target = _resolve(module, level, text[level:]) if isinstance(text, str) else ""
            yield node, target, node in lazy_nodes


def _names(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Every dotted name that is used, calls by their function's name, with the aliases of imports undone."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                aliases[alias.asname or top] = alias.name if alias.asname else top
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func, aliases)
            if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                name = f"{_dotted(node.args[0], aliases)}.{node.args[1].value}"
            yield node, name
        elif isinstance(node, ast.Attribute | ast.Name):
            yield node, _dotted(node, aliases)


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return "?"  # the attribute of a call or a subscript: its module cannot be known


def _resolve(module: str, level: int, name: str | None) -> str:
    """The full name that a relative import means inside `module`; one that climbs too far gives no known package."""
    if not level:
        return name or ""
    parts = module.split(".")
    package = parts[: len(parts) - level] if level < len(parts) else ["(outside)"]
    return ".".join([*package, *([name] if name else [])])


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _is_absolute(node: ast.stmt | ast.Call) -> bool:
    return not (isinstance(node, ast.ImportFrom) and node.level)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def modules() -> list[tuple[str, Path]]:
    files = sorted(path for folder in ("qruntime", "convert") for path in (ROOT / folder).rglob("*.py"))
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in files]


def test_every_module_keeps_the_rules() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{v}" for name, path in modules() for v in violations(name, path.read_text("utf-8"))
    ]
    assert found == []


def test_the_walk_finds_the_modules() -> None:
    names = {name for name, _ in modules()}
    assert {"qruntime.cli", "qruntime.device", "qruntime.ops.__init__", "convert.__main__", "convert.stock"} <= names


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qruntime.errors", "from .device import GB"),
        ("qruntime.errors", "from . import device"),
        ("qruntime.errors", "import qruntime.device"),
        ("qruntime.errors", "def f():\n    from .device import GB"),
        ("qruntime.errors", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .device import GB"),
        ("qruntime.ops.reference", "from ..quant import linear"),
        ("qruntime.ops.reference", "from ..quant.linear import QLinear"),
        ("qruntime.quant.__init__", "from ..models import ar"),
        ("qruntime.memory.planner", "from ..prompt import ArPrompt"),
        ("qruntime.prompt", "from .pipeline import GlmImagePipeline"),
        ("qruntime.prompt", "from qruntime import pipeline"),
        ("qruntime.prompt", "from . import GlmImagePipeline"),
        ("qruntime.prompt", "import qruntime"),
        ("qruntime.media", "import importlib\nimportlib.import_module('qruntime.cli')"),
        ("qruntime.media", "from importlib import import_module as load\nload('.cli', 'qruntime')"),
        ("qruntime.media", "import importlib\nname = 'qruntime.cli'\nimportlib.import_module(name)"),
        ("qruntime.media", "__import__('convert')"),
        ("qruntime.pipeline", "from .cli import main"),
        ("qruntime.pipeline", "from .helpers import anything"),
        ("qruntime.helpers", "from .errors import InputError"),
        ("qruntime.__init__", "from .request import GenerateRequest"),
        ("qruntime.__init__", "def f():\n    from .device import GB"),
        ("qruntime.pipeline", "from ..convert import run"),
        ("qruntime.pipeline", "def f():\n    from .convert import run"),
        ("qruntime.pipeline", "def f():\n    import benchmarks"),
        ("qruntime.cli", "from .convert.run import convert"),
        ("qruntime.cli", "from qruntime import convert"),
        ("qruntime.cli", "def f():\n    import convert"),
        ("qruntime.cli", "def f():\n    from convert.run import convert"),
        ("qruntime.cli", "def f():\n    import benchmarks.cases"),
        ("qruntime.pipeline", "def f():\n    import transformers"),
        ("qruntime.cli", "def f():\n    from diffusers import GlmImagePipeline"),
        ("qruntime.quant.int8", "import bitsandbytes as bnb"),
        ("convert.stock", "import diffusers"),
        ("convert.stock", "from optimum.quanto import quantize"),
        ("convert.run", "def f():\n    import transformers"),
        ("convert.run", "import convert.recipe"),
        ("convert.run", "from convert.recipe import Recipe"),
        ("convert.run", "from qruntime.convert.recipe import Recipe"),
        ("convert.run", "from qruntime import convert"),
        ("convert.run", "from ..errors import InputError"),
        ("convert.run", "def f():\n    import benchmarks"),
        ("qruntime.memory.stream", "import torch\ntorch.cuda.Stream()"),
        ("qruntime.memory.stream", "import torch as t\nt.cuda.Stream()"),
        ("qruntime.memory.stream", "import torch.cuda"),
        ("qruntime.memory.stream", "from torch import cuda"),
        ("qruntime.memory.stream", "from torch.cuda import Stream"),
        ("qruntime.memory.stream", "import torch\nsync = torch.mps.synchronize"),
        ("qruntime.memory.stream", "import torch\ngetattr(torch, 'cuda').synchronize()"),
        ("qruntime.ops.triton_int4", "import torch\nx = [torch.cuda.current_device() for _ in 'a']"),
        ("convert.run", "import torch\ntorch.cuda.is_available()"),
        ("qruntime.pipeline", "print('hello')"),
        ("qruntime.pipeline", "def f(show=print):\n    show('hello')"),
        ("qruntime.checkpoint.reader", "import pickle"),
        ("qruntime.checkpoint.reader", "def f():\n    from pickle import loads"),
        ("qruntime.checkpoint.reader", "import torch\ntorch.load('x')"),
        ("qruntime.checkpoint.reader", "from torch import load\nload('x')"),
        ("convert.run", "from torch import load as read\nread('x')"),
        ("convert.run", "import yaml"),
        ("convert.recipe", "eval('1')"),
        ("convert.recipe", "exec('1')"),
        ("qruntime.device", "import os\nos.environ['A']"),
        ("qruntime.device", "import os\nos.environ.get('A')"),
        ("qruntime.device", "from os import environ"),
        ("qruntime.device", "import os as o\no.getenv('A')"),
        ("convert.run", "from os import getenv as g\ng('A')"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qruntime.device", "from .errors import InputError\nimport torch\ntorch.cuda.is_available(), torch.mps"),
        ("qruntime.ops.reference", "from . import torch_int4\nfrom ..device import GB"),
        ("qruntime.ops.__init__", "from . import reference\nfrom .reference import dequantize"),
        ("qruntime.models.ar", "from ..quant.linear import QLinear\nfrom .config import Config"),
        ("qruntime.prompt", "from .request import GenerateRequest"),
        ("qruntime.pipeline", "from . import __version__, prompt\nfrom .memory import stream"),
        ("qruntime.cli", "def f():\n    from .convert.run import convert\n    print(convert)"),
        ("qruntime.cli", "def f():\n    from qruntime.convert import run"),
        ("qruntime.__main__", "from .cli import main"),
        ("qruntime.__init__", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .request import A"),
        ("qruntime.__init__", "def f():\n    from .pipeline import GlmImagePipeline"),
        ("qruntime.media", "import torch\nmodel.eval(); torch.backends.mps.is_available(); x.cuda"),
        (
            "convert.run",
            "from qruntime import __version__\nfrom qruntime.cli import main\nfrom . import recipe\nprint(1)",
        ),
        ("convert.__main__", "from .run import convert"),
        ("convert.stock", "def f():\n    import diffusers\n    from optimum.quanto import quantize"),
    ],
)
def test_what_the_rules_allow_is_not_flagged(module: str, source: str) -> None:
    assert violations(module, source) == []
