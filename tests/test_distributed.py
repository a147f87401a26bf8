# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Two processes compute what one does."""

import math
from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from training_helpers import (
    SCRIPT,
    largest_difference,
    metrics,
    networks_in,
    run_command,
    run_here,
    saved_teacher,
    script_arguments,
)

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks import load_pipeline
from hf_flowdistill.training.distributed import check_accelerator, check_world_size


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT)


def test_two_processes_are_one(tmp_path):
    """Three steps of 1 image x 2 micro-batches x 2 processes, and of 2 images x 2 micro-batches."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{number} squares" for number in range(150)) + "\n")
    common = {"max_train_images": 12, "prompt_file": prompts}
    run_command(*TORCHRUN, *script_arguments(tmp_path / "two", train_batch_size=1, **common))
    run_here(*script_arguments(tmp_path / "one", **common))
    cache_one, cache_two = (sorted((tmp_path / n / "conditioning").glob("[!.]*")) for n in ("one", "two"))
    assert len(cache_one) == 5  # the index, three shards of prompts (each process wrote its own), one negative prompt
    assert {p.name: p.read_bytes() for p in cache_one} == {p.name: p.read_bytes() for p in cache_two}
    one, two = networks_in(tmp_path / "one" / "checkpoint-12"), networks_in(tmp_path / "two" / "checkpoint-12")
    teacher = load_pipeline(saved_teacher("stable_diffusion_3")).transformer.state_dict()
    for role in ("generator", "fake_score"):
        moved = {f"{role}.{name}": tensor for name, tensor in teacher.items()}
        assert largest_difference({name: one[name] for name in moved}, moved) > 1e-3
    assert largest_difference(one, two) < 2e-6

    lines_one, lines_two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(lines_one) == len(lines_two) == 3
    for first, second in zip(lines_one, lines_two):
        for name in first.keys() - {"images_per_second"}:
            assert math.isclose(first[name], second[name], rel_tol=1e-3, abs_tol=1e-6), name


def test_processes_that_do_not_see_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world_size(2)
    with pytest.raises(UserError, match="started 2 processes but this one counts 1"):
        check_world_size(1)


def test_launches_that_would_be_computed_wrongly():
    def accelerator(precision, kind):
        return SimpleNamespace(mixed_precision=precision, distributed_type=DistributedType(kind))

    for precision in ("no", "bf16"):
        for kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
            check_accelerator(accelerator(precision, kind))
    for precision in ("fp16", "fp8"):
        with pytest.raises(UserError, match=f"mixed precision {precision} was launched.*bf16 or no"):
            check_accelerator(accelerator(precision, "NO"))
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        with pytest.raises(UserError, match=f"{kind} was launched, but networks cannot be sharded yet"):
            check_accelerator(accelerator("bf16", kind))
