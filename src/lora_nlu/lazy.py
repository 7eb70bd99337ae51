"""Names of a package that are imported when first used (PEP 562), so that importing the package itself is fast."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, names_by_module: dict[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """The `__getattr__` and `__all__` of a package.

    names_by_module: for each of the package's modules the names that it provides, separated by blanks.
    """
    module_of = {name: module for module, names in names_by_module.items() for name in names.split()}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    module = sys.modules[package]
    module.__dir__ = lambda: sorted({*vars(module), *module_of})  # type: ignore[method-assign]  # completion in a shell
    return __getattr__, sorted(module_of)
