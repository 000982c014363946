"""Who may import whom: every import of every file, function bodies too, goes to a lower floor or stays in its room."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "loratune"
FLOORS = [
    {"errors", "work", "plugs", "system", "spec", "statistics"},
    {"samplers", "schedules", "data", "demo", "record"},
    {"finetune", "trackers"},
    {"executors", "downstream"},
    {"selection", "preference"},
    {"report"},
    {"delivery"},
    {"study"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ALONE = {
    "torch": ("finetune", "downstream", "data/batches.py", "delivery/merge.py", "delivery/reload.py"),
    "PyNomad": ("samplers/nomad_process.py",),
    "nni": ("samplers/nni_tpe.py",),
}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            below = node.module == "loratune"
            found += [f"loratune.{alias.name}" for alias in node.names] if below else [node.module or ""]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    place = file.relative_to(PACKAGE)
    room = place.parts[0].removesuffix(".py")
    assert room in FLOOR, f"{room} stands on no floor; name it in FLOORS and in docs/design.md"
    for name in imports(file):
        first, _, rest = name.partition(".")
        if first == "loratune":
            target = rest.partition(".")[0]
            assert target in FLOOR, f"{place} imports the package root or an unknown room: {name}"
            same = FLOOR[target] == FLOOR[room] == 0 or target == room  # the ground floor is one room
            assert same or FLOOR[target] < FLOOR[room], f"{place} imports {name}, which is not below it"
        elif first in ALONE and not place.as_posix().startswith(ALONE[first]):
            raise AssertionError(f"{place} imports {name}, which belongs in {ALONE[first]} alone")


# A command's two functions, a process's entry, and what makes a room's object from a study's description.
SHARED = {"add_arguments", "main", "build"}


def test_no_public_name_and_no_file_stands_twice() -> None:
    names: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and node.name not in SHARED:
                names.setdefault(node.name, []).append(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in names.items() if len(files) > 1} == {}
    stems = [file.stem for file in FILES if file.stem not in ("__init__", "base")]
    assert {stem for stem in stems if stems.count(stem) > 1} == set()
