# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tiny saved teachers, and ways to run the training script on them."""

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tiny_pipelines
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "score_distillation" / "train_sid_dit.py"
PROMPTS = ["red circle", "blue square", "green ring", "red square", "red circle"]
PIPELINE_KWARGS = {"sana": {"complex_human_instruction": None, "use_resolution_binning": False}}


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="flowdistill-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def saved_teacher(name: str) -> Path:
    """A pipeline of tiny_pipelines in a folder."""
    path = folder() / name
    with quiet():
        getattr(tiny_pipelines, name)().save_pretrained(path)
    return path


@functools.cache
def saved_student(name: str = "stable_diffusion_3") -> Path:
    """A pipeline as `saved_teacher`'s, of which all transformer weights are a little different."""
    path, pipeline = folder() / f"student_of_{name}", getattr(tiny_pipelines, name)()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), quiet():
        for parameter in pipeline.transformer.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        pipeline.save_pretrained(path)
    return path


@functools.cache
def prompt_file() -> Path:
    path = folder() / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def script_arguments(output_dir, *more, teacher="stable_diffusion_3", **named) -> list[str]:
    """A command line: 4 images per update in two micro-batches, and a learning rate that moves weights."""
    values = {
        "pretrained_model_name_or_path": saved_teacher(teacher),
        "prompt_file": prompt_file(),
        "output_dir": output_dir,
        "resolution": tiny_pipelines.HEIGHT,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_images": 8,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-2,
        "ema_half_life_images": 10,
        "checkpointing_images": 4,
        "report_to": "none",
        **({"pipeline_kwargs": json.dumps(PIPELINE_KWARGS[teacher])} if teacher in PIPELINE_KWARGS else {}),
        **named,
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None] + list(more)


def run_here(*arguments) -> None:
    """The script's `main` in this process."""
    from score_distillation.train_sid_dit import main

    reset_accelerate()
    try:
        with quiet():
            main([str(argument) for argument in arguments])
    finally:
        reset_accelerate()


def run_command(*command, check=True) -> subprocess.CompletedProcess:
    """A command with the package on its path and one thread, so that bits can be compared between runs."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    paths = [ROOT / "src", ROOT / "examples", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths)
    result = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def reset_accelerate() -> None:
    """Accelerate keeps one state per process; every run of the script needs its own."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@contextlib.contextmanager
def quiet():
    """Progress bars and log lines are not what a test is about."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def metrics(output_dir) -> list[dict]:
    return [json.loads(line) for line in Path(output_dir, "metrics.jsonl").read_text().splitlines()]


def networks_in(checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of the three networks in a checkpoint."""
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    assert [file.stem for file in files] == ["ema", "fake_score", "generator"]
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def optimizers_in(checkpoint) -> dict:
    files = sorted(Path(checkpoint).glob("*_optimizer.pt"))
    assert len(files) == 2
    return {file.stem: torch.load(file, weights_only=True) for file in files}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)
