# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Networks by role through the real script: exact resume, accumulation, what a checkpoint holds, the student."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from score_distillation import train_sid_dit
from test_resume import same_bits, same_metrics
from training_helpers import (
    metrics,
    networks_in,
    quiet,
    reset_accelerate,
    run_here,
    saved_teacher,
    script_arguments,
)

from hf_flowdistill.commands import export
from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.adapters import LORA_FILE


ADAPTERS = {"lora": ["ema", "fake_score", "generator"], "lora_fake": ["fake_score"]}


@pytest.mark.parametrize("networks", ADAPTERS)
def test_four_steps_are_two_and_two_more(networks, tmp_path):
    """Bit for bit; of an adapter the checkpoint holds its matrices only."""
    settings = {"networks": networks, "rank": 4, "lora_alpha": 8}
    run_here(*script_arguments(tmp_path / "whole", max_train_images=16, **settings))
    run_here(*script_arguments(tmp_path / "parts", max_train_images=8, **settings))
    more = {"max_train_images": 16, "resume_from_checkpoint": "latest"}
    run_here(*script_arguments(tmp_path / "parts", **more, **settings))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    same_bits(whole / "checkpoint-16", parts / "checkpoint-16")
    same_metrics(whole, parts)
    first, last = (networks_in(whole / f"checkpoint-{images}") for images in (4, 16))
    for name in last:
        network, _, rest = name.partition(".")
        assert (network in ADAPTERS[networks]) == (".lora_A." in rest or ".lora_B." in rest)
    moved = {name.split(".")[0] for name in last if not torch.equal(first[name], last[name])}
    assert moved == {"ema", "fake_score", "generator"}
    with pytest.raises(UserError, match=r"networks \(was '.*', now 'full'\), rank \(was 4, now None\)"):
        run_here(*script_arguments(parts, **more))


def drawn(pipeline, scheduler, **arguments):
    """Latents of four steps with the student's scheduler."""
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    return pipeline("red circle", num_inference_steps=4, output_type="latent", height=32, width=32, **arguments).images


@pytest.mark.parametrize("teacher", ["stable_diffusion_3", "flux", "sana"])
def test_the_student_is_merged_with_its_lora_beside_it(teacher, tmp_path):
    """The teacher's stock pipeline with the LoRA file draws what the exported student draws."""
    settings = {"networks": "lora", "rank": 4, "lora_alpha": 16, "learning_rate": 1e-2, "teacher": teacher}
    run_here(*script_arguments(tmp_path / "run", "--validation_prompts", "red circle", **settings))
    student_dir = tmp_path / "run" / "student"
    arguments = {"use_resolution_binning": False} if teacher == "sana" else {}
    arguments |= {"guidance_scale": 1.0}
    with quiet():
        student, stock = (DiffusionPipeline.from_pretrained(path) for path in (student_dir, saved_teacher(teacher)))
    plain = load_file(saved_teacher(teacher) / "transformer" / "diffusion_pytorch_model.safetensors")
    exported = load_file(student_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    changed = {name for name in plain if not torch.equal(plain[name], exported[name])}
    assert plain.keys() == exported.keys() and changed and all("block" in name for name in changed)
    expected, before = (drawn(pipeline, student.scheduler, **arguments) for pipeline in (student, stock))
    with quiet():
        stock.load_lora_weights(student_dir)
    loaded = drawn(stock, student.scheduler, **arguments)
    assert (loaded - expected).abs().max() < 1e-2 * (before - expected).abs().max()
    assert load_file(student_dir / LORA_FILE).keys() == {
        f"transformer.{name}" for name in load_file(tmp_path / "run" / "checkpoint-8" / "ema.safetensors")
    }
    export.main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "again")])
    for file in (LORA_FILE, "transformer/diffusion_pytorch_model.safetensors"):
        ours, theirs = (load_file(folder / file) for folder in (tmp_path / "again", student_dir))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"networks": "lora", "base_quantization": "nf4"},
        {"networks": "lora", "base_quantization": "8bit", "weight_dtype": "bfloat16"},
        {"networks": "lora_fake", "weight_dtype": "bfloat16"},
        {"use_8bit_adam": None},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_lean_runs_are_resumed_exactly(settings, tmp_path):
    """A quantized base, bfloat16 beside float32 adapters, 8-bit moments: two steps are one and one more."""
    pytest.importorskip("bitsandbytes")
    flags = ["--use_8bit_adam"] if "use_8bit_adam" in settings else []
    run_here(*script_arguments(tmp_path / "whole", *flags, **settings))
    run_here(*script_arguments(tmp_path / "parts", *flags, max_train_images=4, **settings))
    run_here(*script_arguments(tmp_path / "parts", *flags, resume_from_checkpoint="latest", **settings))
    assert [line["skipped_updates"] for line in metrics(tmp_path / "parts")] == [0, 0]
    first, whole, parts = (
        networks_in(tmp_path / path) for path in ("whole/checkpoint-4", "whole/checkpoint-8", "parts/checkpoint-8")
    )
    assert all(torch.equal(whole[name], tensor) for name, tensor in parts.items())
    moved = {name.split(".")[0] for name in whole if not torch.equal(first[name], whole[name])}
    assert moved == {"ema", "fake_score", "generator"}


REFUSED = {
    "a rank of nothing": ({"rank": 4}, "--rank is of LoRAs: choose --networks lora or lora_fake, or leave it out"),
    "layers of nothing": ({"lora_layers": "to_q"}, "--lora_layers is of LoRAs"),
    "no rank": ({"networks": "lora", "rank": 0}, "--rank is 0: it must be at least 1"),
    "a negative alpha": ({"networks": "lora", "lora_alpha": -1}, "--lora_alpha is -1.0: it must be a number above 0"),
    "unknown layers": (
        {"networks": "lora_fake", "lora_layers": "to_q,colour"},
        "--lora_layers has 'colour', which is the end of no linear layer's name in SD3Transformer2DModel",
    ),
    "a trained base": (
        {"networks": "lora_fake", "base_quantization": "nf4"},
        "--base_quantization is of a teacher that nothing else is trained on: choose --networks lora",
    ),
    "nothing to round": (
        {"weight_dtype": "float32", "bf16_rounding": "nearest"},
        "--bf16_rounding is of bfloat16 weights that are trained",
    ),
    "nothing to round in LoRAs": (
        {"networks": "lora", "weight_dtype": "bfloat16", "bf16_rounding": "stochastic"},
        "LoRAs are float32: choose --weight_dtype bfloat16 and --networks full or lora_fake",
    ),
    "shards of a quantized base": (
        {"networks": "lora", "base_quantization": "nf4", "sharding": "full"},
        "bitsandbytes takes no shards: leave out --use_8bit_adam and --base_quantization, or --sharding",
    ),
    "shards of moments": (
        {"sharding": "hybrid", "config": "use_8bit_adam: true"},
        "bitsandbytes takes no shards: leave out --use_8bit_adam",
    ),
    "nothing to offload": (
        {"networks": "lora", "sharding": "full", "config": "cpu_offload: true"},
        "--cpu_offload is of networks that are trained whole, which --networks lora has none of",
    ),
}


@pytest.mark.parametrize("dry_run", [None, 1])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case, dry_run, tmp_path):
    settings, sentence = REFUSED[case]
    if "config" in settings:
        (tmp_path / "flags.yaml").write_text(settings["config"])
        settings = {**settings, "config": tmp_path / "flags.yaml"}
    with pytest.raises(UserError, match=sentence) as error:
        run_here(*script_arguments(tmp_path / "run", dry_run=dry_run, **settings))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_library_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--networks lora needs peft, which is not installed: pip install peft"):
        run_here(*script_arguments(tmp_path / "run", networks="lora"))
    with pytest.raises(UserError, match="--use_8bit_adam needs bitsandbytes, which is not installed"):
        run_here(*script_arguments(tmp_path / "run", "--use_8bit_adam"))


def test_a_dry_run_tells_adapters_and_memory(tmp_path, capsys):
    settings = {"networks": "lora", "rank": 2, "lora_layers": "to_q", "weight_dtype": "bfloat16", "dry_run": 1}
    reset_accelerate()
    train_sid_dit.main(script_arguments(tmp_path / "run", **settings))
    reset_accelerate()
    printed = capsys.readouterr().out.splitlines()
    start = load_file(saved_teacher("stable_diffusion_3") / "transformer" / "diffusion_pytorch_model.safetensors")
    wrapped = [tensor.shape for name, tensor in start.items() if name.endswith("to_q.weight")]
    size = sum(2 * (rows + columns) for rows, columns in wrapped)
    assert f"networks: lora, rank 2 on {len(wrapped)} linear layers, {size:,} parameters each" in printed
    assert "precision: bfloat16 weights, no autocast" in printed  # nothing is rounded
    rows = [line.split()[:4] for line in printed if line.startswith("  ")]
    assert rows[:2] == [["teacher", "bfloat16", "0.00", "GB"], ["adapter", "of", "the", "generator"]]
