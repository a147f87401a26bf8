# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The README's commands do what the README says: train, sample, load both ways."""

import configparser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = {"accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"], "python": [sys.executable]}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def command(mark):
    """The words of the README's one shell command that holds `mark`."""
    joined = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    (found,) = [line for line in joined if mark in line]
    return shlex.split(found, comments=True)


def run(words, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like the checkout, with the README's training done in it, shortened to two updates."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "examples").symlink_to(ROOT / "examples")
    program, *words = command("recipe.yaml")
    short = ["--max_train_images", "96", "--sigmas_start_images", "48", "--report_to", "none"]
    done = run([*PROGRAMS[program], *words, *short], folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_training_leaves_what_the_readme_names(checkout):
    names = {path.name for path in (checkout / "shapes-student" / "student").iterdir()}
    assert {"model_index.json", "pipeline.py", "README.md", "training_args.json", "transformer"} <= names


def test_generate_writes_the_pictures(checkout):
    program, *words = command("generate.py")
    done = run([*PROGRAMS[program], *words], checkout)
    assert done.returncode == 0, done.stderr
    pictures = sorted((checkout / "samples").glob("*.png"))
    assert len(pictures) == 3  # one for each prompt, and the grid
    assert {Image.open(picture).size for picture in pictures if "grid" not in picture.name} == {(40, 40)}


def test_both_snippets_draw_the_same_picture(checkout):
    pictures = []
    for i, snippet in enumerate(blocks("python")):
        (checkout / f"snippet-{i}.py").write_text(f"{snippet}\nimage.save('snippet-{i}.png')\n", encoding="utf-8")
        done = run([sys.executable, f"snippet-{i}.py"], checkout)
        assert done.returncode == 0, done.stderr
        pictures.append(np.asarray(Image.open(checkout / f"snippet-{i}.png")))
    own, stock = pictures
    assert np.array_equal(own, stock) and own.std() > 1


def test_everything_the_readme_links_to_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_examples_need_what_the_package_needs():
    """requirements.txt of the examples is the package's own list with its `train` extra."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = setup["options"]["install_requires"] + setup["options.extras_require"]["train"]
    written = (ROOT / "examples" / "score_distillation" / "requirements.txt").read_text(encoding="utf-8")
    assert written.split() == sorted(needed.split(), key=str.lower)


LAUNCHED = [
    *PROGRAMS["accelerate"],
    "launch",
    "--config_file",
    "examples/score_distillation/accelerate_configs/cpu.yaml",
]


@pytest.mark.parametrize(
    ("program", "script"),
    [(LAUNCHED, "train_sid_dit.py"), (PROGRAMS["python"], "generate.py")],
    ids=["launch", "python"],
)
def test_help_names_its_arguments(program, script):
    done = run([*program, f"examples/score_distillation/{script}", "--help"], ROOT)
    assert done.returncode == 0 and "--pretrained_model_name_or_path" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 119
