"""Finding modules and the names they bind without running any of their code."""

import ast
import sys
from importlib.machinery import ModuleSpec


def locate(module: str) -> ModuleSpec | None:
    """The module's spec, or None; without importing its parents as `importlib.util.find_spec` does."""
    spec, path = None, None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        spec = next((found for finder in sys.meta_path if (found := finder.find_spec(name, path)) is not None), None)
        if spec is None:
            return None
        # A package that is imported may have extended its own path.
        extended = getattr(sys.modules.get(name), "__path__", None)
        path = list(extended or spec.submodule_search_locations or [])
    return spec


def bound_names(tree: ast.Module) -> set[str]:
    """Names bound anywhere in a module: more than its attributes, so a name that is not here is surely missing."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
