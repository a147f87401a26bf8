# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The student's folder: how it samples, how it loads where this package is not installed, what is and is not in it."""

import copy
import inspect
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.rollout import Sampler, rollout
from hf_flowdistill.hub.export import TrainingRecord, check_export_dir, export_student
from hf_flowdistill.hub.secrets import without_secrets
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.hub.student import few_step_pipeline, render_pipeline, sampler_change, student_scheduler
from hf_flowdistill.networks.loading import load_pipeline


PROMPT = "a cat"
PAPERS = Sampler()
# name -> (builder, arguments of the call that the student is trained with)
PIPELINES = {
    "sd3": (tiny_pipelines.stable_diffusion_3, {"max_sequence_length": 8}),
    "sd3_without_t5": (lambda: tiny_pipelines.stable_diffusion_3(with_t5=False), {"max_sequence_length": 0}),
    "sana": (
        tiny_pipelines.sana,
        {"complex_human_instruction": None, "use_resolution_binning": False, "height": 32, "width": 32},
    ),
    "flux": (tiny_pipelines.flux, {"max_sequence_length": 8, "height": 32, "width": 32}),
}


def export(tmp_path, name="sd3", sampler=PAPERS, **kwargs):
    build, pipeline_kwargs = PIPELINES[name]
    pipeline = build()
    folder = export_student(pipeline, tmp_path / "student", sampler, pipeline_kwargs=pipeline_kwargs, **kwargs)
    return pipeline, folder


def student_of(folder):
    return few_step_pipeline(load_pipeline(folder), read_settings(folder))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_steps, expected", [(1, [1, 0]), (2, [1, 0.5, 0]), (4, [1, 0.75, 0.5, 0.25, 0])])
@pytest.mark.parametrize("name", ["sd3", "sana", "flux"])
def test_a_stock_call_visits_the_few_step_sigmas(name, num_steps, expected):
    build, pipeline_kwargs = PIPELINES[name]
    pipeline = build()
    pipeline.scheduler = student_scheduler(num_steps)
    call = {"guidance_scale": 1.0, "output_type": "np", **pipeline_kwargs}
    images = pipeline(PROMPT, num_inference_steps=num_steps, **call).images
    torch.testing.assert_close(pipeline.scheduler.sigmas, torch.tensor(expected).float(), rtol=0, atol=1e-6)
    assert np.isfinite(images).all()


@pytest.mark.parametrize("num_steps, sigmas", [(1, None), (2, None), (4, None), (3, [1.0, 0.8, 0.75])])
@pytest.mark.parametrize("noise_type", ["fresh", "fixed", "ddim"])
def test_the_student_draws_what_the_rollout_of_training_draws(tmp_path, noise_type, num_steps, sigmas):
    _, folder = export(tmp_path, sampler=Sampler(num_steps, noise_type, sigmas))
    student = student_of(folder)
    latents = student([PROMPT, "dogs"], generator=seeded(3), output_type="latent").images

    conditioning = student.encode_prompt(
        [PROMPT, "dogs"], None, None, do_classifier_free_guidance=False, max_sequence_length=8
    )
    generator = seeded(3)
    noises = [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(num_steps)]

    def velocity_fn(x_t, sigma):
        embeddings = {"encoder_hidden_states": conditioning[0], "pooled_projections": conditioning[2]}
        return student.transformer(hidden_states=x_t, timestep=1000 * sigma, **embeddings, return_dict=False)[0]

    with torch.no_grad():
        expected = rollout(velocity_fn, noises.__getitem__, num_steps=num_steps, noise_type=noise_type, sigmas=sigmas)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


FRESH_PROCESS = """
import os, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_flowdistill":
            raise ImportError("hf_flowdistill is not installed here")

sys.meta_path.insert(0, NotInstalled())
try:
    import hf_flowdistill
except ImportError:
    pass
else:
    raise SystemExit("the test process can import hf_flowdistill")
for number in range(2):
    names = {}
    exec(open(f"snippet_{number}.py").read(), names)
    names["image"].save(f"image_{number}.png")
    print(type(names["pipe"]).__module__)
"""


@pytest.mark.parametrize("name", ["sd3_without_t5", "flux"])
def test_the_cards_snippets_draw_the_same_image_where_only_diffusers_is_installed(tmp_path, name):
    from PIL import Image

    _, folder = export(tmp_path, name)
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 2
    for number, snippet in enumerate(snippets):
        (tmp_path / f"snippet_{number}.py").write_text(snippet)
    kept = {variable: os.environ[variable] for variable in ("PATH", "HOME") if variable in os.environ}
    caches = {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH_PROCESS],
        cwd=tmp_path,
        env={**kept, **caches, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    custom, stock = done.stdout.split()[-2:]
    assert custom.startswith("diffusers_modules.local") and stock.startswith("diffusers.pipelines")

    prompt = re.search(r'pipe\("(.*?)"', snippets[0]).group(1)
    here = np.asarray(student_of(folder)(prompt, generator=seeded(0)).images[0])
    images = [np.asarray(Image.open(tmp_path / f"image_{number}.png")) for number in range(2)]
    assert here.std() > 1
    np.testing.assert_array_equal(images[0], here)
    np.testing.assert_array_equal(images[1], here)


@pytest.mark.parametrize("name", ["sd3", "sana", "flux"])
def test_the_stock_class_draws_the_same_from_the_global_generator(tmp_path, name):
    _, folder = export(tmp_path, name)
    stock = load_pipeline(folder)
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, **PIPELINES[name][1], "output_type": "np"}
    torch.manual_seed(3)
    image = stock(PROMPT, **call).images[0]
    assert image.std() > 0.01
    np.testing.assert_array_equal(image, student_of(folder)(PROMPT, generator=seeded(3), output_type="np").images[0])


def test_the_generators_alone_decide_the_images(tmp_path):
    _, folder = export(tmp_path)
    student = student_of(folder)
    torch.manual_seed(1)
    together = student([PROMPT, "dogs"], generator=[seeded(0), seeded(1)], output_type="np").images
    torch.manual_seed(2)
    alone = [student(p, generator=seeded(i), output_type="np").images[0] for i, p in enumerate([PROMPT, "dogs"])]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    assert abs(together[0] - student(PROMPT, generator=seeded(7), output_type="np").images[0]).max() > 0.01


def test_the_student_takes_other_numbers_of_steps_and_leaves_its_scheduler_as_it_was(tmp_path):
    _, folder = export(tmp_path)
    student = student_of(folder)
    config = dict(student.scheduler.config)
    for num_steps, expected in [(1, [1, 0]), (2, [1, 0.5, 0]), (4, [1, 0.75, 0.5, 0.25, 0])]:
        images = student(PROMPT, num_inference_steps=num_steps, output_type="np").images
        assert np.isfinite(images).all()
        torch.testing.assert_close(student.scheduler.sigmas, torch.tensor(expected).float(), rtol=0, atol=1e-6)
    student(PROMPT, sigmas=[1.0, 0.6])
    torch.testing.assert_close(student.scheduler.sigmas, torch.tensor([1, 0.6, 0]), rtol=0, atol=1e-6)
    assert dict(student.scheduler.config) == config
    assert "step" not in vars(student.scheduler)


@pytest.mark.parametrize("name", ["sd3", "sana", "flux"])
def test_a_student_samples_at_its_own_sigmas(tmp_path, name):
    """With the stock class too, which its card tells to; in fewer steps at the first and the last of them."""
    levels, off = [1.0, 0.8, 0.75, 0.4], {"guidance_scale": 1.0}
    _, folder = export(tmp_path, name, Sampler(sigmas=levels))
    student, stock = student_of(folder), load_pipeline(folder)

    def visited(pipeline, **call):
        pipeline(PROMPT, output_type="latent", **call)
        return [round(sigma, 6) for sigma in pipeline.scheduler.sigmas.tolist()]

    assert visited(stock, sigmas=levels, **off, **PIPELINES[name][1]) == [*levels, 0]
    assert "sigmas=[1.0, 0.8, 0.75, 0.4]" in (folder / "README.md").read_text()
    assert visited(student) == [*levels, 0]
    for num_steps, expected in [(3, [1, 0.75, 0.4, 0]), (2, [1, 0.4, 0]), (1, [1, 0])]:
        assert visited(student, num_inference_steps=num_steps) == expected
    assert visited(student, sigmas=[1.0, 0.5], num_inference_steps=2) == [1, 0.5, 0]
    with pytest.raises(ValueError, match="This student has 4 steps"):
        student(PROMPT, num_inference_steps=5)
    assert sampler_change(folder, 4, "fresh", levels) is None
    assert "4 steps at sigma 1, 0.8, 0.75, 0.4, fresh noise; it" in sampler_change(folder, 4, "fresh")


def test_the_students_call_has_the_stock_signature_with_its_own_defaults(tmp_path):
    _, folder = export(tmp_path)
    student = student_of(folder)
    parameters = inspect.signature(student.__call__).parameters
    assert list(parameters) == list(inspect.signature(StableDiffusion3Pipeline.__call__).parameters)[1:]
    assert [parameters[name].default for name in ("num_inference_steps", "guidance_scale")] == [4, 1.0]
    assert parameters["max_sequence_length"].default == 8
    student(PROMPT)
    assert student.guidance_scale == 1.0 and student.num_timesteps == 4


def test_a_saved_copy_of_the_student_is_a_student(tmp_path):
    _, folder = export(tmp_path)
    student_of(folder).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "pipeline.py").read_text() == (folder / "pipeline.py").read_text()
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "copy")) is StableDiffusion3Pipeline


def test_export_takes_the_students_transformer_and_leaves_the_teacher_alone(tmp_path):
    teacher = tiny_pipelines.stable_diffusion_3()
    transformer, scheduler = teacher.transformer, teacher.scheduler
    before = copy.deepcopy(transformer.state_dict())
    generator = copy.deepcopy(transformer)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.5)
    folder = export_student(teacher, tmp_path / "student", Sampler(2), transformer=generator, dtype=torch.bfloat16)

    assert teacher.transformer is transformer and teacher.scheduler is scheduler and scheduler.config.shift == 3.0
    assert all(torch.equal(before[name], value) for name, value in transformer.state_dict().items())
    assert next(generator.parameters()).dtype == torch.float32
    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == generator.state_dict().keys()
    for name, value in generator.state_dict().items():
        assert torch.equal(saved[name], value.to(torch.bfloat16)), name
    assert read_settings(folder)["student"]["dtype"] == "bfloat16"
    weights = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > 0]
    assert not [file for file in weights if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_export_refuses_a_network_of_another_class(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion_3()
    with pytest.raises(TypeError, match="AutoencoderKL is no SD3Transformer2DModel"):
        export_student(pipeline, tmp_path / "student", Sampler(), transformer=pipeline.vae)


def test_export_replaces_only_its_own_earlier_export(tmp_path):
    _, folder = export(tmp_path)
    (folder / "grid.png").write_bytes(b"kept")
    export(tmp_path, sampler=Sampler(2))
    assert read_settings(folder)["student"]["num_steps"] == 2
    assert (folder / "grid.png").read_bytes() == b"kept"
    assert not list(tmp_path.glob("*.tmp"))

    other = tmp_path / "other"
    other.mkdir()
    assert check_export_dir(other) == other
    (other / "training_args.json").write_text('{"someone": "else"}')
    with pytest.raises(UserError, match="not empty and holds no earlier export"):
        export_student(tiny_pipelines.stable_diffusion_3(), other, Sampler())
    with pytest.raises(UserError, match="is a file"):
        check_export_dir(other / "training_args.json")


def test_nothing_secret_and_no_path_of_this_machine_is_exported(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "environment-secret")
    pipeline = tiny_pipelines.stable_diffusion_3()
    pipeline.save_pretrained(tmp_path / "home" / "teacher")
    teacher = load_pipeline(tmp_path / "home" / "teacher")
    arguments = {
        "learning_rate": 1e-6,
        "hub_token": "argument-secret",
        "wandb_api_key": "key-secret",
        "output_dir": str(tmp_path / "home" / "run"),
        "note": "pushed with argument-secret and environment-secret and hf_abcdefghijklmnopqrstuvwxyz",
        "nested": {"token": "nested-secret", "paths": [str(tmp_path / "home" / "x.txt")]},
    }
    folder = export_student(teacher, tmp_path / "student", Sampler(), training=TrainingRecord(arguments))
    assert read_settings(folder)["training_args"] == {
        "learning_rate": 1e-6,
        "output_dir": "run",
        "note": "pushed with [removed] and [removed] and [removed]",
        "nested": {"paths": ["x.txt"]},
    }
    texts = {file: file.read_text() for file in folder.rglob("*") if file.suffix in (".json", ".md", ".py")}
    assert len(texts) > 8
    for file, text in texts.items():
        assert "-secret" not in text and str(tmp_path) not in text, file


def test_the_teachers_licence_goes_along_and_components_of_a_folder_cannot_be_referenced(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion_3()
    pipeline.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A teacher\n")
    teacher = load_pipeline(tmp_path / "teacher")
    card = (export_student(teacher, tmp_path / "student", Sampler()) / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "does not allow commercial use" in card
    with pytest.raises(UserError, match="cannot be referenced, since it is not on the Hub"):
        export_student(teacher, tmp_path / "other", Sampler(), shared_components="referenced")
    assert not (tmp_path / "other").exists()


def test_a_full_disk_leaves_the_earlier_export_and_is_one_sentence(tmp_path):
    """As far as a limit on the size of files is one."""
    pipeline, folder = export(tmp_path)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(UserError, match="student cannot be written: .*; make room, or choose another"):
            export_student(pipeline, folder, Sampler(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert not list(tmp_path.glob("*.tmp"))


def test_weights_that_are_pickles_are_not_loaded(tmp_path):
    tiny_pipelines.stable_diffusion_3().save_pretrained(tmp_path)
    network = tmp_path / "transformer"
    (network / "diffusion_pytorch_model.safetensors").unlink()
    tiny_pipelines.stable_diffusion_3().transformer.save_pretrained(network, safe_serialization=False)
    assert list(network.glob("*.bin"))
    with pytest.raises(UserError, match="does not load as a diffusers pipeline: .*safetensors"):
        load_pipeline(tmp_path)


def test_without_secrets_leaves_ordinary_values_alone():
    arguments = {"seed": 0, "alpha": 1.0, "prompts": ["a cat"], "resume": None, "flag": True, "model": "org/name"}
    arguments["negative_prompt"] = "/imagine nothing"
    assert without_secrets(arguments) == arguments


def test_secrets_are_removed_at_every_depth(tmp_path):
    arguments = {"hub_token": "argument-secret", "deep": {"note": "argument-secret"}, "data": str(tmp_path)}
    assert without_secrets(arguments) == {"deep": {"note": "[removed]"}, "data": tmp_path.name}


def test_a_kill_in_the_middle_of_an_export_does_not_stop_the_next(tmp_path, monkeypatch):
    pipeline = tiny_pipelines.stable_diffusion_3()
    replace, moved = os.replace, []

    def killed_the_third_time(source, target):
        moved.extend([target] if Path(target).parent == tmp_path / "student" else [])
        if len(moved) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_the_third_time)
    with pytest.raises(KeyboardInterrupt):
        export_student(pipeline, tmp_path / "student", Sampler())
    monkeypatch.undo()
    assert not (tmp_path / "student" / "model_index.json").exists()
    export_student(pipeline, tmp_path / "student", Sampler())
    assert (tmp_path / "student" / "model_index.json").exists()


def test_what_cannot_become_a_pipeline_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="takes no argument 'colour'"):
        render_pipeline(StableDiffusion3Pipeline, "fresh", {"colour": "red"})
    with pytest.raises(UserError, match="cannot be a default"):
        render_pipeline(StableDiffusion3Pipeline, "fresh", {"height": torch.ones(1)})
    with pytest.raises(UserError, match="no noise type"):
        render_pipeline(StableDiffusion3Pipeline, "fresh'\nimport os", {})

    pipeline = tiny_pipelines.stable_diffusion_3()
    pipeline.__class__ = type("HomeMadePipeline", (StableDiffusion3Pipeline,), {})
    with pytest.raises(UserError, match="HomeMadePipeline is not a class of diffusers"):
        export_student(pipeline, tmp_path / "student", Sampler())
    assert not (tmp_path / "student").exists()


def test_folders_without_settings_are_no_students(tmp_path):
    assert read_settings(tmp_path) is None
    (tmp_path / "training_args.json").write_text("not json")
    assert read_settings(tmp_path) is None
    (tmp_path / "training_args.json").write_text(json.dumps(["a", "list"]))
    assert read_settings(tmp_path) is None
