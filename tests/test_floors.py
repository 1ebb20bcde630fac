"""The levels of the folders: a file imports only from lower levels, or from its own folder."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "lorafit"

TABLE = tomllib.loads((SRC.parents[1] / "docs" / "rooms.toml").read_text(encoding="utf-8"))["floor"]
FLOORS = {name.removesuffix("/").removesuffix(".py"): n for n, floor in enumerate(TABLE) for name in floor}
FILES = sorted(SRC.rglob("*.py"))


def room(file: Path) -> str:
    """The folder of src/lorafit a file is in, or its own name where it is in none."""
    return file.relative_to(SRC).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module imported anywhere in a file, with the line; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import: name the module in full"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def faults(tree: ast.AST, importer: str) -> list[str]:
    """Imports of a file in the room `importer` that go up, or sideways into another room."""
    found = []
    for name, line in imports(tree):
        parts = name.split(".")
        if parts[0] != "lorafit":
            continue
        other = parts[1] if parts[1:] else "__init__"
        if other != importer and FLOORS.get(other, 99) >= FLOORS[importer]:
            found.append(f"line {line}: {importer} ({FLOORS[importer]}) imports {name} ({FLOORS.get(other)})")
    return found


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_every_file_has_its_floor_and_every_floor_its_file() -> None:
    assert {room(file) for file in FILES} == set(FLOORS)
    assert len(FLOORS) == sum(map(len, TABLE))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SRC)))
def test_a_file_imports_only_from_lower_floors(file: Path) -> None:
    assert faults(parsed(file), room(file)) == []


@pytest.mark.parametrize(
    "text",
    [
        "from lorafit.jobs.train import run_training",
        "import lorafit.attachment",
        "from lorafit import cli",
        "from lorafit import jobs",
        "def f():\n    from lorafit.evaluation.compare import compare",
        "if TYPE_CHECKING:\n    from lorafit.training.loop import train",
        "from lorafit.not_in_the_table import something",
        "import lorafit",
    ],
)
def test_an_import_from_above_is_noticed_wherever_it_stands(text: str) -> None:
    assert len(faults(ast.parse(text), "adapters")) == 1


def signatures() -> Iterator[tuple[str, int, str]]:
    """Every function below src but the commands, whose parameters are flags: its parameters, and what its docstring and
    its class's say."""
    for path in sorted(SRC.rglob("*.py")):
        if path.parent.name == "cli":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for parent in ast.walk(tree):
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    names = [one.arg for one in given if one.arg not in ("self", "cls")]
                    told = [ast.get_docstring(node) or ""]
                    told += [ast.get_docstring(parent) or ""] if isinstance(parent, ast.ClassDef) else []
                    yield f"{path.relative_to(SRC)}: {node.name}", len(names), " ".join(" ".join(told).split())


def test_a_function_of_more_than_six_parameters_says_why() -> None:
    many = [(name, said) for name, n, said in signatures() if n > 6]
    assert many, "nothing is looked at"
    assert [name for name, said in many if "more than six parameters" not in said.lower()] == []


def test_imports_from_below_and_from_the_own_folder_are_allowed() -> None:
    text = "from lorafit.adapters.formats import peft\nfrom lorafit.layers.site import Site\nimport torch"
    assert faults(ast.parse(text), "adapters") == []


def imported_by(wanted: str) -> set[str]:
    """Files, relative to src/lorafit, that import a module or anything in it."""
    return {
        str(file.relative_to(SRC))
        for file in FILES
        for name, _ in imports(parsed(file))
        if name == wanted or name.startswith(f"{wanted}.")
    }


def test_only_one_file_imports_peft() -> None:
    assert imported_by("peft") == {"jobs/with_peft.py"}


def test_nothing_imports_the_file_that_imports_peft() -> None:
    assert imported_by("lorafit.jobs.with_peft") == set()


@pytest.mark.parametrize("name", ["vllm", "llama_cpp", "pickle", "accelerate", "datasets"])
def test_what_lorafit_does_without_is_not_imported(name: str) -> None:
    assert imported_by(name) == set()


def test_no_file_opens_a_pickle() -> None:
    assert [str(file) for file in FILES if "torch.load" in file.read_text(encoding="utf-8")] == []


def test_whatever_opens_a_model_refuses_the_code_that_comes_with_it() -> None:
    """Left unsaid, transformers asks on the terminal, and one key runs it."""
    calls = [
        (file.name, call)
        for file in FILES
        if file.name != "with_peft.py"  # PEFT opens no model
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
    ]
    assert len(calls) >= 4
    for name, call in calls:
        said = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
        assert [isinstance(v, ast.Constant) and v.value is False for v in said] == [True], f"{name}:{call.lineno}"
