"""Who may import whom: low-level modules know nothing of those above them; the library never reads the command line."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lora_nlu"
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "files": {"errors"},
    "tasks": {"errors"},
    "metrics": {"errors"},
    "labels": {"errors", "tasks"},
    "kernels": set(),
    "lora": {"errors", "kernels"},
    "methods": {"kernels", "lora"},
    "packing": {"errors"},
    "regularization": set(),
    "blocks": {"errors", "kernels", "lora", "methods", "packing", "regularization"},
    "modeling_roberta": {"kernels", "lora", "packing", "blocks"},
    "modeling_deberta_v2": {"kernels", "lora", "packing", "blocks"},
    "sharded": set(),
    "adapters": {
        "lora",
        "methods",
        "errors",
        "files",
        "labels",
        "sharded",
        "convert",
    },  # the last one as a program only: python -m lora_nlu.adapters
    "convert": {"adapters", "labels", "loading", "lora", "methods", "tasks", "errors", "files"},
    "data": {"labels", "tasks", "errors"},
    "flags": {"errors", "files", "lora", "metrics"},
    "loading": {
        "adapters",
        "blocks",
        "labels",
        "modeling_roberta",
        "modeling_deberta_v2",
        "methods",
        "errors",
        "files",
        "lora",
    },
    "processes": {"errors"},
    "trainer": {"adapters", "methods", "errors", "files", "processes", "regularization", "sharded"},
    "runs": {"convert", "trainer", "adapters", "data", "labels", "metrics", "lora", "methods", "errors", "files"},
    "submission": {"tasks", "errors", "files"},
    "pictures": {"tasks", "files"},
    "report": {"submission", "pictures", "tasks", "errors", "files"},
    "similarity": {"adapters", "errors", "files"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Our own modules that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names |= {f"lora_nlu.{node.module or alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lora_nlu":
            names |= {f"lora_nlu.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[1] for name in names if name.startswith("lora_nlu.")}


def test_every_source_file_has_its_place_in_the_order():
    assert {path.stem for path in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_those_below_it(path):
    assert imported(ast.parse(path.read_text())) <= ALLOWED.get(path.stem, set())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_reads_the_command_line_or_the_environment(path):
    forbidden = {("sys", "argv"), ("os", "environ"), ("os", "environb"), ("os", "getenv"), ("os", "putenv")}
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add((node.value.id, node.attr))
        elif isinstance(node, ast.ImportFrom):
            used |= {(node.module, alias.name) for alias in node.names}
    assert not used & forbidden


@pytest.mark.parametrize(
    "line",
    ["import lora_nlu.data", "from lora_nlu.data import tokenize", "from lora_nlu import data", "from .data import x",
     "from . import data", "def f():\n    from lora_nlu import data"],
)  # fmt: skip
def test_the_walk_sees_every_way_to_import(line):
    assert imported(ast.parse(line)) == {"data"}
