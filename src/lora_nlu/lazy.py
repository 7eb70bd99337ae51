"""Names of a package that are imported when first used (PEP 562), so that importing the package itself is fast."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """The `__getattr__` and `__all__` of a package: what its file imports, for type checkers, `as` the same name."""
    imports = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.ImportFrom)]
    module_of = {alias.asname: str(node.module) for node in imports for alias in node.names if alias.asname}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    module = sys.modules[package]
    module.__dir__ = lambda: sorted({*vars(module), *module_of})  # type: ignore[method-assign]  # completion in a shell
    return __getattr__, sorted(module_of)
