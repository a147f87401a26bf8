# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Help and refusals that need no model answer at once: of every script and command, and what they may import."""

import functools
import importlib
import os
import re
import subprocess
import sys

import pytest
from accelerate.utils import LoggerType
from training_helpers import ROOT, folder, prompt_file, run_command

import hf_flowdistill
from hf_flowdistill.cli import COMMANDS
from hf_flowdistill.training.names import TRACKERS


SCRIPTS = sorted(
    str(path.relative_to(ROOT / "examples"))
    for place in ("score_distillation", "shapes")
    for path in (ROOT / "examples" / place).glob("*.py")
    if re.search(r"= parse_(args|given)\(|parser.parse_args\((input_args)?\)", path.read_text())
)
LIGHT = ("yaml",)  # what may be imported, beside Python's own modules and ours
CLIENT = ("huggingface_hub.hf_api", "huggingface_hub.repocard")  # besides, by those of
WITH_HUB = {"push", "verify"}
TRAIN, DRAW = "score_distillation/train_sid_dit.py", "score_distillation/generate.py"
TEACHER = "--pretrained_model_name_or_path=a/b"
RUN = """
import runpy, sys
before = set(sys.modules)
sys.argv = sys.argv[1:]
run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
if sys.argv[0].endswith(".py"):
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    run(sys.argv[0], run_name="__main__")
finally:
    print("imported", *{name.partition(".")[0] for name in set(sys.modules) - before}, file=sys.stderr)
"""


def run(what: str, words, **environment) -> tuple[subprocess.CompletedProcess, set[str]]:
    """A script or command, and the modules (the first part of their names) that it has imported."""
    command = [ROOT / "examples" / what] if what.endswith(".py") else ["hf_flowdistill.cli", what]
    paths = [ROOT / "src", ROOT / "examples" / "score_distillation", ROOT / "examples" / "shapes"]
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, command), *map(str, words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    *said, imported = done.stderr.splitlines()
    done.stderr = "\n".join(said)
    return done, set(imported.split()[1:])


@functools.cache
def loaded_with(module: str) -> set[str]:
    code = f"import sys, {module}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def check_imports(what: str, imported: set[str]) -> None:
    modules = LIGHT + (CLIENT if what.rpartition("/")[2] in WITH_HUB else ())
    ours = {"hf_flowdistill"} | {path.stem for path in (ROOT / "examples").rglob("*.py")}
    assert not imported - ours - sys.stdlib_module_names - set().union(*map(loaded_with, modules))


def file(name: str, text: str = ""):
    path = folder() / name
    path.write_text(text)
    return path


REFUSED = {  # script or command -> a refusal, words that lead to it
    "a mistyped argument": (TRAIN, "unrecognized arguments: --alfa=1", lambda: ["--alfa=1"]),
    "no teacher": (TRAIN, "--pretrained_model_name_or_path is missing", lambda: []),
    "no teacher there": (TRAIN, "does not exist", lambda: ["--pretrained_model_name_or_path=./nowhere"]),
    "out of bounds": (TRAIN, "--num_steps is 0: it must be at least 1", lambda: [TEACHER, "--num_steps=0"]),
    "a choice": (TRAIN, "invalid choice: 'half'", lambda: [TEACHER, "--sharding=half"]),
    "bad buckets": (TRAIN, "must be pairs of height and width", lambda: [TEACHER, "--aspect_ratio_buckets=512,"]),
    "bad JSON": (TRAIN, "must be a JSON object", lambda: [TEACHER, "--pipeline_kwargs=[]"]),
    "no weighting": (TRAIN, "unknown weighting", lambda: [TEACHER, *prompts(), "--weighting=heavy"]),
    "no levels": (TRAIN, "--sigmas must be 4 numbers", lambda: [TEACHER, *prompts(), "--sigmas", "1"]),
    "guidance twice": (
        TRAIN,
        "which the training sets",
        lambda: [TEACHER, '--pipeline_kwargs={"guidance_scale": 2}'],
    ),
    "no LoRA": (TRAIN, "--rank is of LoRAs", lambda: [TEACHER, *prompts(), "--rank=4"]),
    "no shards": (TRAIN, "--cpu_offload is of sharded", lambda: [TEACHER, *prompts(), "--cpu_offload", "--fit=none"]),
    "no stage": (TRAIN, "is of the adversarial stage", lambda: [TEACHER, *prompts(), "--adversarial_weight=1"]),
    "no tracker": (TRAIN, "is not installed here", lambda: [TEACHER, *prompts(), "--report_to=paper"]),
    "a file": (TRAIN, "is a file: choose", lambda: [TEACHER, *prompts(), f"--output_dir={file('note')}"]),
    "in use": (TRAIN, "is not empty: choose", lambda: [TEACHER, *prompts(), f"--output_dir={file('note').parent}"]),
    "prompts twice": (TRAIN, "the prompts are given twice", lambda: [TEACHER, *prompts(), "--dataset_name=x"]),
    "no recipe": (TRAIN, "is none of those here", lambda: [TEACHER, *prompts(), "--recipe=none_such"]),
    "no prompt file": (TRAIN, "does not exist: give a text", lambda: [TEACHER, "--prompt_file=no", *output()]),
    "an empty file": (
        TRAIN,
        "holds no prompt",
        lambda: [TEACHER, f"--prompt_file={file('empty.txt')}", *output()],
    ),
    "a strange file": (
        TRAIN,
        "has unknown arguments: alfa",
        lambda: [f"--config={file('strange.yaml', 'alfa: 1')}"],
    ),
    "nothing to draw": (DRAW, "there is nothing to draw", lambda: [TEACHER]),
    "nobody to draw": (DRAW, "--pretrained_model_name_or_path is missing", lambda: []),
    "too few prompts": ("shapes/table.py", "--num_prompts must be at least", lambda: ["--num_prompts=1"]),
    "too few to judge": ("shapes/demo.py", "must be at least", lambda: ["--num_prompts=1"]),
    "of the training": ("shapes/demo.py", "unrecognized arguments: --alfa", lambda: ["--alfa"]),
    "no student": ("shapes/adversarial.py", "is no student", lambda: ["--student=nowhere"]),
    "no students": ("shapes/colours.py", "is no student", lambda: ["--students=nowhere"]),
    "a folder in use": ("shapes/image_set.py", "is there already", lambda: [str(folder())]),
    "inspect nothing": ("inspect", "does not exist", lambda: ["./nowhere"]),
    "plan nothing": ("plan", "does not exist", lambda: ["./nowhere"]),
    "no GPUs": ("plan", "--gpus is 0", lambda: ["a/b", "--gpus=0"]),
    "no place": ("plan", "is in no folder", lambda: ["a/b", "--output_file=/no/such/file"]),
    "export nothing": ("export", "is missing or given twice", lambda: ["--output_dir=out"]),
    "no checkpoint": ("export", "holds no checkpoint", lambda: ["./nowhere", *output()]),
    "no repository": ("export", "neither a folder nor an id", lambda: ["--from_repo=./nowhere", *output()]),
    "no export": ("card", "holds no exported student", lambda: ["./nowhere"]),
    "push nothing": ("push", "holds no exported student", lambda: ["./nowhere", "--repo_id=me/student"]),
    "push twice": ("push", "leave out --revision", lambda: ["a", "--repo_id=b", "--create_pr", "--revision=c"]),
    "no id": ("verify", "is no repository id", lambda: ["a/b/c"]),
}


def prompts():
    return [f"--prompt_file={prompt_file()}"]


def output():
    return [f"--output_dir={folder() / 'new'}"]


@pytest.mark.parametrize("what", [*SCRIPTS, *COMMANDS])
def test_help_answers_at_once(what):
    done, imported = run(what, ["--help"])
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")
    check_imports(what, imported)


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_answers_at_once(case):
    what, sentence, words = REFUSED[case]
    done, imported = run(what, words())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and sentence in done.stderr and "\n" not in done.stderr
    check_imports(what, imported)


def test_every_script_is_looked_at():
    assert {TRAIN, DRAW, "shapes/demo.py", "shapes/train_flux_teacher.py"} <= set(SCRIPTS) and len(SCRIPTS) == 10
    assert {what for what, _, _ in REFUSED.values()} >= set(COMMANDS)


@pytest.mark.parametrize("package", ["flow", "losses", "teachers"])
def test_a_package_gives_its_names_on_demand(package):
    """A name that a module has too would be the one or the other, as it happens."""
    module = importlib.import_module(f"hf_flowdistill.{package}")
    modules = {path.stem for path in (ROOT / "src" / "hf_flowdistill" / package).glob("*.py")}
    assert module.__all__ and not set(module.__all__) & modules
    assert all(getattr(module, name).__module__.startswith(module.__name__) for name in module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018
    assert hf_flowdistill.__version__


def test_the_trackers_are_accelerates():
    assert TRACKERS.keys() == {str(name) for name in LoggerType} - {"all"}


def test_of_several_processes_one_says_it_and_torchrun_again_at_the_end():
    script = ROOT / "examples" / TRAIN
    done = run_command("-m", "torch.distributed.run", "--nproc_per_node=2", script, "--alfa=1", check=False)
    lines = done.stderr.splitlines()
    sentence = "error: unrecognized arguments: --alfa=1 (see train_sid_dit.py --help)."
    assert done.returncode == 1 and lines.count(sentence) == 1
    assert lines[-2] == f"  traceback : {sentence}" and set(lines[-1]) == {"="}


def test_under_accelerate_the_sentence_is_the_last_line():
    launch = ["-m", "accelerate.commands.launch", "-q", "--cpu"]
    done = run_command(*launch, ROOT / "examples" / TRAIN, "--alfa=1", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr  # the launcher's own code
    assert done.stderr.splitlines()[-1] == "error: unrecognized arguments: --alfa=1 (see train_sid_dit.py --help)."


def test_a_process_that_fails_alone_says_so(tmp_path):
    code = "import hf_flowdistill.errors as e\ne.PATIENCE = 0\ne.exit_on_user_error(lambda: int(1))()\n"
    code += "def main(): raise e.UserError('here only.')\ne.exit_on_user_error(main)()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "LOCAL_RANK": "1"}
    environment |= {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: here only.\n")
    assert "error: here only." in (tmp_path / "error.json").read_text()
