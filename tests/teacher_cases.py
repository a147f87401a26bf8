# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Every pipeline class that is shown to be a teacher, how its tiny pipeline is called, and its contract."""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import tiny_pipelines
import tiny_qwen3_vl_teachers
import tiny_teachers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.teachers import Contract, learn_contract


@dataclass(frozen=True)
class Teacher:
    """How a tiny pipeline is built and called.

    `attributes` are set on the pipeline (and are not saved with it), because the class makes large images only or pads
    to a thousand tokens. `unsaved` components are such as diffusers itself cannot read back after its own saving.
    `bfloat16` is the tolerance, relative to the largest output, of the replay of the pipeline's own call in bfloat16.
    """

    build: Callable
    kwargs: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    attributes: dict[str, Any] = field(default_factory=dict)
    unsaved: tuple[str, ...] = ()
    bfloat16: float = 0.02

    def settled(self, pipeline):
        """`pipeline` with the attributes."""
        for name, value in self.attributes.items():
            setattr(pipeline, name, value)
        return pipeline


SHORT = {"max_sequence_length": 16}
SANA = {**SHORT, "use_resolution_binning": False}
TEACHERS = {
    "sd3": Teacher(tiny_pipelines.stable_diffusion_3, SHORT),
    "sana": Teacher(tiny_pipelines.sana, SANA),
    "sana sprint's teacher": Teacher(
        functools.partial(
            tiny_pipelines.sana, timestep_scale=0.001, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
        ),
        SANA,
    ),
    "flux": Teacher(tiny_pipelines.flux, SHORT),
    "flux kontext": Teacher(tiny_teachers.flux_kontext, {**SHORT, "max_area": 32 * 32}),
    "flux2": Teacher(tiny_teachers.flux2, {"max_sequence_length": 512, "text_encoder_out_layers": [1, 2, 3]}),
    "flux2 klein": Teacher(
        tiny_teachers.flux2_klein, {"max_sequence_length": 64, "text_encoder_out_layers": [1, 2, 3]}
    ),
    "qwen image": Teacher(tiny_teachers.qwen_image),
    "qwen image 2.1": Teacher(tiny_qwen3_vl_teachers.qwen_image_2_1, {"use_kv_cache": False}, unsaved=("processor",)),
    "z image": Teacher(tiny_teachers.z_image, {"max_sequence_length": 128}),
    "lumina2": Teacher(tiny_teachers.lumina2, size=64),
    "lumina": Teacher(tiny_teachers.lumina, size=64),
    "aura flow": Teacher(tiny_teachers.aura_flow, SHORT),
    "chroma": Teacher(tiny_teachers.chroma, SHORT),
    "cogview4": Teacher(tiny_teachers.cogview4),
    "hidream": Teacher(tiny_teachers.hidream, SHORT, attributes={"default_sample_size": 8}),
    "hunyuan image": Teacher(tiny_teachers.hunyuan_image, attributes={"tokenizer_max_length": 128}),
    "hunyuan image, distilled guidance": Teacher(
        functools.partial(tiny_teachers.hunyuan_image, guidance_embeds=True), attributes={"tokenizer_max_length": 128}
    ),
    "prx": Teacher(tiny_teachers.prx, {"use_resolution_binning": False}, unsaved=("text_encoder",)),
    "bria": Teacher(tiny_teachers.bria, SHORT),
    "bria fibo": Teacher(tiny_teachers.bria_fibo, size=64),
    "bria fibo2": Teacher(
        tiny_qwen3_vl_teachers.bria_fibo2,
        attributes={"text_encoder_out_layers": ((0, 1, 2), (1, 2, 2))},
        unsaved=("processor",),
    ),
    "kandinsky5": Teacher(tiny_teachers.kandinsky5, size=64, attributes={"resolutions": [(64, 64)]}),
    "krea2": Teacher(tiny_teachers.krea2, {"max_sequence_length": 192}),
    "ovis image": Teacher(tiny_teachers.ovis_image, {"max_sequence_length": 192}),
    "longcat image": Teacher(
        tiny_teachers.longcat_image, {"enable_prompt_rewrite": False}, unsaved=("text_processor",)
    ),
    "ernie image": Teacher(tiny_teachers.ernie_image),
}


@functools.cache
def learned(name: str) -> SimpleNamespace:
    """A teacher's pipeline with its contract."""
    return _learned(name, TEACHERS[name].build())


@functools.cache
def learned_in_bfloat16(name: str) -> SimpleNamespace:
    """The same in bfloat16: its folder, loaded as diffusers does there."""
    teacher = TEACHERS[name]
    pipeline = teacher.build()
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        given = {part: getattr(pipeline, part) for part in teacher.unsaved}
        for component in given.values():
            if isinstance(component, torch.nn.Module):
                component.to(torch.bfloat16)
        return _learned(name, load_pipeline(folder, dtype=torch.bfloat16, **given))


def _learned(name: str, pipeline) -> SimpleNamespace:
    teacher = TEACHERS[name]
    contract: Contract = learn_contract(
        teacher.settled(pipeline), height=teacher.size, width=teacher.size, pipeline_kwargs=teacher.kwargs
    )
    return SimpleNamespace(name=name, teacher=teacher, pipeline=pipeline, contract=contract)
