"""Undocumented names of other libraries: each that the code uses is listed with its reason, and still exists."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from private_names import OPTIONAL_NAMES, PRIVATE_NAMES

from lora_nlu.training.sharded import ShardedTrainer

PACKAGE = Path(__file__).parents[1] / "src" / "lora_nlu"
LISTED = {(owner, name) for owner, names in PRIVATE_NAMES.items() for name in names}
NAMES = {name for _, name in LISTED} | {name for names in OPTIONAL_NAMES.values() for name in names}
MODULES = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]


def owner_of(path: str) -> Any:
    """The module or class of this dotted name."""
    module, _, rest = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ImportError:
        return getattr(owner_of(module), rest)


def sources(owner: Any) -> str:
    """The code of a module, or of a class and its bases."""
    return "".join(
        map(inspect.getsource, [c for c in owner.__mro__ if c is not object] if inspect.isclass(owner) else [owner])
    )


@pytest.mark.parametrize("owner, name", sorted(LISTED))
def test_a_private_name_exists_in_the_installed_version(owner, name):
    """As an attribute of the module or class, or as one that its code sets on instances."""
    found = owner_of(owner)
    assert hasattr(found, name) or f".{name} = " in sources(found) or f'"{name}"' in sources(found), PRIVATE_NAMES[
        owner
    ][name]


def test_an_overridden_method_of_the_trainer_is_called_as_transformers_calls_it():
    """What we name of its arguments is what transformers' method has, in order: another order would be read wrongly."""
    bases = [c for c in ShardedTrainer.__mro__ if c.__module__.startswith("lora_nlu")]
    theirs = next(c for c in ShardedTrainer.__mro__ if c.__module__.startswith("transformers"))
    different = {}
    for kind in bases:
        for name, ours in vars(kind).items():
            if inspect.isfunction(ours) and name != "__init__" and hasattr(theirs, name):
                kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
                mine = [p.name for p in inspect.signature(ours).parameters.values() if p.kind not in kinds]
                other = [*inspect.signature(getattr(theirs, name)).parameters]
                if mine != other[: len(mine)] or (
                    len(mine) < len(other) and len(mine) == len(inspect.signature(ours).parameters)
                ):
                    different[name] = (mine, other)
    assert different == {}


def own_names(trees: list[ast.Module]) -> set[str]:
    """Every name that our code defines."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def private_names(tree: ast.Module) -> set[str]:
    """Names that start with an underscore, of attributes, of getattr's strings and of modules."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            names |= {part.value for part in node.args[1:2] if isinstance(part, ast.Constant)}
        elif isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_every_private_name_that_the_code_uses_is_listed():
    trees = {path: ast.parse(path.read_text()) for path in MODULES}
    ours, modules = own_names([*trees.values()]), {part for owner in PRIVATE_NAMES for part in owner.split(".")}
    ours.add("_asdict")  # documented, of a NamedTuple
    used = {
        f"{path.name}: {name}" for path, tree in trees.items() for name in private_names(tree) - ours - NAMES - modules
    }
    assert used == set()


def test_every_private_method_that_the_code_overrides_is_listed():
    unlisted = set()
    for path in MODULES:
        module = importlib.import_module(".".join(["lora_nlu", *path.relative_to(PACKAGE).with_suffix("").parts]))
        for kind in (c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__):
            foreign = [base for base in kind.__mro__ if not base.__module__.startswith("lora_nlu")]
            private = {name for name in vars(kind) if name.startswith("_") and not name.startswith("__")}
            unlisted |= {name for name in private - NAMES if any(name in vars(base) for base in foreign)}
    assert unlisted == {"_backward_cls"}  # torch's, on every autograd.Function


@pytest.mark.parametrize(
    "line",
    ["x._private", "getattr(x, '_private', 0)", "from torch._private import f", "from torch import _private"],
)  # fmt: skip
def test_the_walk_sees_every_way_to_use_a_private_name(line):
    assert private_names(ast.parse(line)) == {"_private"}
