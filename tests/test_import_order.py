"""Who may import whom: packages in one order, modules of a package in one order; packages that stay cheap to import."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lora_nlu"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Each package, or single module, with those that it may import.
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "escaping": {"errors"},
    "files": {"errors"},
    "hub": set(),
    "labels": {"errors"},
    "lazy": set(),
    "ops": {"errors", "files"},
    "methods": {"errors", "files", "ops"},
    "models": {"errors", "files", "labels", "ops", "methods"},
    "data": {"errors", "files", "labels"},
    "adapters": {"errors", "escaping", "files", "hub", "labels", "ops", "methods", "models", "data"},
    "training": {"errors", "escaping", "files", "labels", "ops", "methods", "models", "adapters", "data"},
    "predict": {"errors", "escaping", "files", "hub", "methods", "models", "adapters", "data", "training"},
    "report": {"errors", "escaping", "files", "labels", "data", "adapters"},
    "similarity": {"report"},  # the earlier spelling of a command
}
# The modules of each package from the lowest: each may import those before it.
ORDER = {
    "ops": ["processor", "packing", "sharding", "tensors", "compiling", "packed_attention", "kernels", "frozen"],
    "methods": [
        "method", "targets", "table", "description", "linear", "lora", "dora", "pissa", "adalora", "vera", "bottleneck",
        "marking",
    ],  # fmt: skip
    "models": ["losses", "layers", "checkpoints", "modeling_roberta", "modeling_deberta_v2", "loading", "tokenizer"],
    "adapters": [
        "patterns", "adapter", "peft_format", "reading", "writing", "attaching", "loading", "model_card", "converting",
        "__main__",
    ],
    "data": [
        "tasks", "metrics", "examples", "cache", "lines", "user_rows", "texts", "tokenization", "glue",
        "user_labels", "user_files",
    ],
    "training": [
        "launch", "torchrun", "processes", "legacy_flags", "arguments", "help", "checks", "parsing", "inputs",
        "metadata", "file_list", "checkpoints", "graphs", "learning_rates", "trainer", "sharded", "output_folder",
        "model", "runs",
    ],
    "report": [
        "paper", "records", "submission", "collect", "grids", "pictures", "tables", "comparison_pictures",
        "comparison", "similarity", "__main__",
    ],
}  # fmt: skip
# Only these of a package may import adapters: what compares two of them.
READS_ADAPTERS = {"report": {"similarity"}}
READS_ENVIRONMENT = {
    "ops.compiling": {("os", "environ")},  # where the user's cache is
    "ops.kernels": {("os", "environ")},  # LORA_NLU_PACKED_ATTENTION
}
NO_LIBRARIES = [
    "data", "methods", "training", "training.launch", "training.arguments", "training.help", "report",
    "adapters.__main__", "predict",
]  # fmt: skip


def name_of(path: Path) -> str:
    """A module's name below `lora_nlu`: "data.tasks"; "data" for a package's `__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(tree: ast.AST) -> set[str]:
    """Our own modules that a file imports, at any depth of its code, by their names below `lora_nlu`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names |= {f"lora_nlu.{node.module or alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                below = PACKAGE.joinpath(*module.split(".")[1:], alias.name)
                is_module = module.startswith("lora_nlu") and (below.is_dir() or below.with_suffix(".py").is_file())
                names.add(f"{module}.{alias.name}" if is_module else module)
    return {name.partition(".")[2] for name in names if name.startswith("lora_nlu.")}


PACKAGES = [path for path in MODULES if path.name == "__init__.py"]  # whose imports are for type checkers


def test_every_package_and_module_has_a_place_in_the_order():
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages == ORDER.keys()
    assert {path.stem for path in PACKAGE.glob("*.py")} | packages == BELOW.keys() | {"__init__"}
    for package, modules in ORDER.items():
        assert {path.stem for path in (PACKAGE / package).glob("*.py")} == {*modules, "__init__"}, package


@pytest.mark.parametrize("path", [path for path in MODULES if path not in PACKAGES], ids=name_of)
def test_a_module_imports_only_those_below_it(path):
    package, _, module = name_of(path).partition(".")
    for name in imported(ast.parse(path.read_text())):
        other, _, part = name.partition(".")
        if other == package:
            assert ORDER[package].index(part) < ORDER[package].index(module), name
        else:
            assert other in BELOW[package], name
            assert other != "adapters" or module in READS_ADAPTERS.get(package, {module}), name


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: name_of(path) or "lora_nlu")
def test_a_package_provides_lazily_just_what_type_checkers_see(path):
    package = importlib.import_module(f"lora_nlu.{name_of(path)}".rstrip("."))
    checked = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    declared = {alias.name: node.module for node in checked for alias in node.names if node.module != "typing"}
    declared.pop("lazy_names")
    assert sorted(declared) == package.__all__
    for name, module in declared.items():
        assert getattr(package, name) is getattr(importlib.import_module(str(module)), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_importing_these_packages_brings_in_no_library_that_is_slow_to_import():
    code = f"import sys, importlib\nfor name in {NO_LIBRARIES}: importlib.import_module('lora_nlu.' + name)\n"
    code += "print({'torch', 'transformers', 'datasets', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path) or "lora_nlu")
def test_no_module_reads_the_command_line_or_the_environment(path):
    forbidden = {("sys", "argv"), ("os", "environ"), ("os", "environb"), ("os", "getenv"), ("os", "putenv")}
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add((node.value.id, node.attr))
        elif isinstance(node, ast.ImportFrom):
            used |= {(node.module, alias.name) for alias in node.names}
    assert used & forbidden == READS_ENVIRONMENT.get(name_of(path), set())


@pytest.mark.parametrize(
    "line",
    ["import lora_nlu.data.tasks", "from lora_nlu.data.tasks import TASKS", "from lora_nlu.data import tasks",
     "from .data.tasks import x", "def f():\n    from lora_nlu.data import tasks"],
)  # fmt: skip
def test_the_walk_sees_every_way_to_import(line):
    assert imported(ast.parse(line)) == {"data.tasks"}


def test_dir_of_a_package_lists_the_names_that_are_imported_lazily():
    import lora_nlu
    import lora_nlu.methods

    assert {*lora_nlu.__all__, "__version__"} <= {*dir(lora_nlu)}
    assert {*lora_nlu.methods.__all__} <= {*dir(lora_nlu.methods)}
