"""The layers of the package, kept by reading its source."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import nai_xl

PACKAGE = Path(nai_xl.__file__).parent
ROOT = Path(__file__).parent.parent
FILES = sorted(PACKAGE.rglob("*.py"))
# a module imports from its own room and from those to its left; entry points come last and import no other entry point
ROOMS = (
    "redact errors rng files interfaces record diffusion data model optimizer memory distributed adapter engine "
    "tracker evals task config profiler training inspect compare plan sample judge sweep docs"
).split()
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def imported(path: Path) -> Iterator[str]:
    """Full names of everything imported anywhere in a file, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(part: str) -> int:
    """The place of a room or top module of the package; entry points come last."""
    return ROOMS.index(part) if part in ROOMS else len(ROOMS)


def own_part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_there_is_something_to_read() -> None:
    found = {own_part(path) for path in FILES}
    assert {*ROOMS} <= found
    assert "nai_xl.errors.UserError" in set(imported(PACKAGE / "export.py"))


@every_file
def test_imports_run_one_way(path: Path) -> None:
    part = own_part(path)
    for name in imported(path):
        if name.split(".")[0] == "nai_xl" and len(name.split(".")) > 1:
            other = name.split(".")[1]
            assert other == part or place(other) < place(part), f"{part} imports {name}"


@every_file
def test_libraries_stay_where_they_belong(path: Path) -> None:
    at = path.relative_to(PACKAGE).as_posix()
    roots = {name.split(".")[0] for name in imported(path)}
    if not at.startswith(("model/", "memory/")):  # whose actions are diffusers' own switches
        assert not roots & {"diffusers", "transformers"}
    if not at.startswith("config/"):
        assert "hydra" not in roots
    if at.startswith("diffusion/"):
        assert roots <= {"__future__", "collections", "dataclasses", "functools", "math", "typing", "torch", "nai_xl"}
    if at.startswith("data/"):
        assert "accelerate" not in roots


@every_file
def test_nothing_is_pickled_and_no_exception_is_swallowed_whole(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            kinds = [] if node.type is None else ast.walk(node.type)
            names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
            assert names and not names & {"Exception", "BaseException"}, f"line {node.lineno}"


OUTSIDE = sorted(path for folder in ("benchmarks", "experiments", "docs") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_lies_beside_the_package_imports_names_that_it_has(path: Path) -> None:
    for name in imported(path):
        if name.startswith("nai_xl."):
            module, _, attribute = name.rpartition(".")
            there = (ROOT / f"{name.replace('.', '/')}.py").exists() or (ROOT / name.replace(".", "/")).is_dir()
            assert there or hasattr(importlib.import_module(module), attribute), name
