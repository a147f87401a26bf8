# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The house: which room may import which, told from the imports themselves, lazy ones included."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from training_helpers import ROOT


PACKAGE = ROOT / "src" / "hf_flowdistill"
FLOORS = [  # from the ground: a room imports from lower floors, and from itself
    {"__init__", "errors"},
    {"cli"},
    {"flow"},
    {"losses", "teachers"},
    {"networks"},
    {"methods"},
    {"data", "evaluation", "hub"},
    {"training"},
    {"planning"},
    {"commands"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LIBRARIES = {  # room -> what it never imports
    "flow": {"diffusers", "transformers", "accelerate", "peft"},
    "losses": {"diffusers", "transformers", "accelerate", "peft"},
    "teachers": {"accelerate", "peft"},
    "methods": {"accelerate", "peft"},
}


def exists(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return name.startswith("hf_flowdistill.") and (path.with_suffix(".py").exists() or path.is_dir())


def imports(file: Path) -> set[str]:
    """The full names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports by a relative name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if exists(name) else node.module for name in names}
    return found


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def arrows() -> set[tuple[str, str, str]]:
    """(room, room that it imports, file) of all imports between rooms."""
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "hf_flowdistill" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != room_of(file):
                found.add((room_of(file), parts[1], file.name))
    return found


def test_every_room_has_its_floor_and_nothing_else_lies_at_the_top():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "cli", "errors"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders | {"__init__", "cli", "errors"} == set(FLOOR)


def test_imports_go_downwards_only():
    upwards = {arrow for arrow in arrows() if FLOOR[arrow[1]] >= FLOOR[arrow[0]]}
    assert not upwards
    assert ("training", "data", "texts.py") in arrows()  # the test sees what there is


def test_no_module_imports_itself_by_a_detour():
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = ["hf_flowdistill", *file.relative_to(PACKAGE).with_suffix("").parts]
        names[".".join(parts).removesuffix(".__init__")] = file
    graph = {name: {other for other in imports(file) if other in names} - {name} for name, file in names.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("room", LIBRARIES)
def test_a_room_does_not_know_what_it_need_not(room):
    used = {name.split(".")[0] for file in (PACKAGE / room).rglob("*.py") for name in imports(file)}
    assert not used & LIBRARIES[room]


def test_examples_are_imported_by_nothing_in_the_package():
    used = {name.split(".")[0] for file in PACKAGE.rglob("*.py") for name in imports(file)}
    assert not used & {path.stem for path in (ROOT / "examples").rglob("*.py")}


def test_losses_need_torch_alone():
    code = (
        "import sys, hf_flowdistill.losses\n"
        "print(*sorted({'diffusers', 'transformers', 'accelerate', 'peft', 'datasets', 'huggingface_hub', 'PIL'} & "
        "{name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(PACKAGE.parent)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "", done.stderr


def test_files_fit_one_sitting_and_functions_one_screen():
    long = [str(file) for file in PACKAGE.rglob("*.py") if len(file.read_text().splitlines()) > 350]
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                long.append(f"{file}: {node.name}")
    assert not long
    script = (ROOT / "examples" / "score_distillation" / "train_sid_dit.py").read_text().splitlines()
    assert len(script) <= 300
