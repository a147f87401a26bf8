# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a student is beside its weights: its sampler, its pipeline.py, its settings."""

import ast
import copy
import importlib.util
import inspect
import re
import tempfile
from pathlib import Path

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.rollout import NOISE_TYPES
from hf_flowdistill.flow.timesteps import few_step_sigmas
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.networks.reports import complete_weights


def student_scheduler(
    num_steps, noise_type="fresh", num_train_timesteps=1000, last_sigma=None
) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' own scheduler as the few-step sampler: sigma = 1, 1 - 1/n, ..., 1/n, then 0, for n = `num_steps`.

    It does so for pipelines that give it a number of steps and for those that give it their own evenly spaced sigmas.
    With a `last_sigma` in the place of 1/n, sigmas that are given in the call and end there stay as they are. "ddim"
    keeps the noise that each x0 was found with, which is an Euler step; otherwise noise is drawn in every step.
    """
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=num_train_timesteps,
        shift=1.0,
        # A schedule of one step cannot be stretched to its end: diffusers would divide 0 by 0.
        shift_terminal=(last_sigma or 1 / num_steps) if num_steps > 1 else None,
        stochastic_sampling=noise_type != "ddim",
    )


def sampler_change(path, num_steps, noise_type, sigmas=None, *, cache_dir=None) -> str | None:
    """A sentence if the student at `path` has another sampler than this, which it is now to be trained for."""
    settings = read_settings(path, cache_dir=cache_dir)
    if settings is None:
        return None
    own = settings["student"]
    before = _sampler(own["num_steps"], own["noise_type"], own["call_defaults"].get("sigmas"))
    now = _sampler(num_steps, noise_type, sigmas)
    return f"the student {path} was made for {before}; it goes on with {now}." if before != now else None


def _sampler(num_steps, noise_type, sigmas) -> str:
    levels = ", ".join(f"{level:g}" for level in sigmas or few_step_sigmas(num_steps).tolist())
    return f"{num_steps} steps at sigma {levels}, {noise_type} noise"


def render_pipeline(pipeline_class, noise_type, call_defaults, absent_components=()) -> str:
    """The text of pipeline.py: hub/pipeline_template.py with the stock class and what the student needs filled in.

    Raises:
        UserError: if the call of `pipeline_class` does not take an argument in `call_defaults`, if a value there is
            not plain data, or if `noise_type` is unknown.
    """
    name = pipeline_class.__name__
    accepted = inspect.signature(pipeline_class.__call__).parameters
    for argument, value in call_defaults.items():
        if argument not in accepted:
            raise UserError(f"{name} takes no argument {argument!r}: leave it out of the pipeline's arguments.")
        if not _is_literal(value):
            raise UserError(f"{argument}={value!r} cannot be a default of pipeline.py: give numbers, text or lists.")
    if noise_type not in NOISE_TYPES:
        raise UserError(f"{noise_type!r} is no noise type: choose one of {', '.join(NOISE_TYPES)}.")
    code = Path(__file__).with_name("pipeline_template.py").read_text(encoding="utf-8")
    for line, replacement in {
        "from diffusers import .* as StockPipeline": f"from diffusers import {name} as StockPipeline",
        "NOISE_TYPE = .*": f"NOISE_TYPE = {noise_type!r}",
        "CALL_DEFAULTS = .*": f"CALL_DEFAULTS = {call_defaults!r}",
        "ABSENT_COMPONENTS = .*": f"ABSENT_COMPONENTS = {[str(part) for part in absent_components]!r}",
    }.items():
        code, count = re.subn(f"^{line}$", lambda match, text=replacement: text, code, flags=re.MULTILINE)
        if count != 1:
            raise RuntimeError(f"pipeline_template.py has {count} lines of the form {line!r} instead of one.")
    return code


def _is_literal(value) -> bool:
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        return False


def load_student(path, settings, *, dtype, revision=None, variant=None, cache_dir=None):
    """The student at `path` with the stock class, and with its teacher's components where it refers to those.

    Args:
        path: a folder or an id on the Hub.
        settings: of the student, from `read_settings`.
    """
    student, where = settings["student"], {"revision": revision, "variant": variant, "cache_dir": cache_dir}
    if student.get("shared_components") != "referenced":
        return load_pipeline(path, dtype=dtype, **where)
    weights = {"dtype": dtype, "use_safetensors": True}
    with complete_weights(path):
        parts = {
            name: getattr(diffusers, kind).from_pretrained(
                path, subfolder=name, **(where | weights if name == "transformer" else where)
            )
            for name, kind in student["own_components"].items()
        }
    teacher = {"revision": student["teacher_revision"], "cache_dir": cache_dir}
    return load_pipeline(student["base_model"], dtype=dtype, **teacher, **parts)


def few_step_pipeline(pipeline, settings):
    """`pipeline`, loaded with the stock class, as its own pipeline.py would have it: without running code from there.

    It shares its components with `pipeline`. Its call takes the student's defaults, any number of steps, and one
    generator or a list of them as its only source of randomness.

    Args:
        settings: of the student, from `read_settings`.
    """
    student = settings["student"]
    code = render_pipeline(
        type(pipeline), student["noise_type"], student["call_defaults"], student["absent_components"]
    )
    folder = tempfile.TemporaryDirectory(prefix="hf_flowdistill-")
    file = Path(folder.name, "pipeline.py")
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("hf_flowdistill_student", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FewStepPipeline.source_folder = folder  # The file lives as long as the class, which copies it when saved.
    few_step = copy.copy(pipeline)
    few_step.__class__ = module.FewStepPipeline
    return few_step
