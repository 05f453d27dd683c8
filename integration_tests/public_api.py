"""`just api`: public names with their signatures, one text file per page of docs/reference, read without importing any.

A module is public when the reference has it; a name in it, when it does not begin with an underscore.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
REFERENCE, SNAPSHOTS = REPOSITORY / "docs/reference", REPOSITORY / "docs/api"
SOURCES = ("packages/*/src", "recipes/src")
_MODULE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
_INDENT = "    "


def main() -> None:
    """Write every snapshot anew, and remove those whose page is gone."""
    made = snapshots()
    SNAPSHOTS.mkdir(exist_ok=True)
    for file in SNAPSHOTS.glob("*.txt"):
        if file.name not in made:
            file.unlink()
    for name, text in made.items():
        (SNAPSHOTS / name).write_text(text, "utf-8")


def snapshots() -> dict[str, str]:
    """Name of the file -> what it should hold."""
    return {f"{page.stem}.txt": snapshot(page) for page in sorted(REFERENCE.glob("*.md"))}


def snapshot(page: Path) -> str:
    """The public names of a page's modules."""
    modules = _MODULE.findall(page.read_text("utf-8"))
    return "\n\n".join("\n".join([module, *names_in(source_of(module))]) for module in modules) + "\n"


def source_of(module: str) -> str:
    """The text of a module."""
    path = module.replace(".", "/")
    (file,) = [
        file
        for pattern in SOURCES
        for root in REPOSITORY.glob(pattern)
        for file in (root / f"{path}.py", root / path / "__init__.py")
        if file.is_file()
    ]
    return file.read_text("utf-8")


def names_in(source: str) -> list[str]:
    """A line for each public name, with its signature; members of classes below them."""
    return [_INDENT + line for node in ast.parse(source).body for line in _lines(node)]


def _lines(node: ast.stmt, *, of_class: bool = False) -> Iterator[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() if _is_public(node.name):
            yield _function(node)
        case ast.ClassDef() if _is_public(node.name):
            bases = ", ".join(map(ast.unparse, [*node.bases, *(keyword.value for keyword in node.keywords)]))
            yield f"{_decorators(node)}class {node.name}" + (f"({bases})" if bases else "")
            yield from (_INDENT + line for member in node.body for line in _lines(member, of_class=True))
        case ast.AnnAssign(target=ast.Name(id=name)) if _is_public(name):
            # A field's default is part of how its class is made; a table's content is nobody's promise.
            default = f" = {ast.unparse(node.value)}" if of_class and node.value is not None else ""
            yield f"{name}: {ast.unparse(node.annotation)}{default}"
        case ast.Assign(targets=[ast.Name(id=name)]) if _is_public(name):
            yield name
        case ast.TypeAlias(name=ast.Name(id=name)) if _is_public(name):
            yield f"type {name} = {ast.unparse(node.value)}"
        case ast.If() if ast.unparse(node.test) == "TYPE_CHECKING":
            return
        case ast.If() | ast.Try():
            yield from (
                line for member in ast.iter_child_nodes(node) if isinstance(member, ast.stmt) for line in _lines(member)
            )


def _is_public(name: str) -> bool:
    # What Python itself calls is how a class is used.
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__") and name != "__all__")


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"{_decorators(node)}{kind} {node.name}({ast.unparse(node.args)}){returns}"


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    return "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)


if __name__ == "__main__":
    main()
