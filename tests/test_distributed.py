# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Two processes compute what one does."""

import contextlib
import copy
import math
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from teacher_cases import learned
from training_helpers import (
    SCRIPT,
    largest_difference,
    metrics,
    networks_in,
    optimizers_in,
    run_command,
    run_here,
    saved_teacher,
    script_arguments,
)

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks import check_gradient_checkpointing, load_pipeline
from hf_flowdistill.teachers import encode_prompts
from hf_flowdistill.training.checkpointing import find_resume, load_checkpoint
from hf_flowdistill.training.distributed import check_accelerator, check_world_size, sample_noise
from hf_flowdistill.training.optimizers import build_optimizer


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT)


SIX_STEPS = {"max_train_images": 24, "learning_rate": 3e-4, "checkpointing_images": 12}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"{number} squares" for number in range(150)) + "\n")
    return path


@pytest.fixture(scope="module")
def one(prompts, tmp_path_factory):
    """Six steps of 2 images x 2 micro-batches on one process."""
    output_dir = tmp_path_factory.mktemp("one") / "run"
    run_here(*script_arguments(output_dir, prompt_file=prompts, **SIX_STEPS))
    teacher = load_pipeline(saved_teacher("stable_diffusion_3")).transformer.state_dict()
    trained = networks_in(output_dir / "checkpoint-24")
    for role in ("generator", "fake_score"):
        assert largest_difference({name: trained[f"{role}.{name}"] for name in teacher}, teacher) > 1e-3
    return output_dir


@pytest.fixture(scope="module")
def sharded(prompts, tmp_path_factory):
    """The same on two processes that share the networks; gradient checkpointing and sample sheets change nothing."""
    output_dir = tmp_path_factory.mktemp("sharded") / "run"
    sheets = ("--validation_prompts", "red circle", "--validation_images=12", "--gradient_checkpointing")
    arguments = script_arguments(output_dir, *sheets, prompt_file=prompts, train_batch_size=1, **SIX_STEPS)
    run_command(*TORCHRUN, *arguments, "--sharding=full")
    return output_dir


def same_run(first, second):
    """The students to 1e-6, and the metrics to their last digits."""
    students = [load_file(run / "student/transformer/diffusion_pytorch_model.safetensors") for run in (first, second)]
    assert largest_difference(*students) < 1e-6
    lines, others = metrics(first), metrics(second)
    assert len(lines) == len(others) == 6
    for line, other in zip(lines, others):
        for name in line.keys() - {"images_per_second"}:
            assert math.isclose(line[name], other[name], rel_tol=1e-3, abs_tol=1e-6), name


def same_checkpoint(run, expected):
    """Networks and optimizers of the last checkpoint of `run`, which may be of shards, against a whole one."""
    network = load_pipeline(saved_teacher("stable_diffusion_3")).transformer
    networks = {name: copy.deepcopy(network) for name in ("generator", "fake_score", "ema")}
    optimizers = {name: build_optimizer(networks[name]) for name in ("generator", "fake_score")}
    state = load_checkpoint(run / "checkpoint-24", networks=networks, optimizers=optimizers)
    assert (state["images_seen"], state["step"], state["skipped_updates"]) == (24, 6, 0)
    found = {f"{name}.{key}": tensor for name in networks for key, tensor in networks[name].state_dict().items()}
    assert largest_difference(found, networks_in(expected / "checkpoint-24")) < 1e-6
    for name, saved in optimizers_in(expected / "checkpoint-24").items():
        moments = optimizers[name.removesuffix("_optimizer")].state_dict()["state"]
        assert moments.keys() == saved["state"].keys()
        for index, values in saved["state"].items():
            assert moments[index]["step"] == values["step"] == 6
            torch.testing.assert_close(moments[index]["exp_avg_sq"], values["exp_avg_sq"], rtol=1e-3, atol=1e-6)


def test_a_shared_rollout_is_the_same_on_two_processes_and_after_resuming(one, prompts, tmp_path):
    """4 x 1 images on one process against 1 x 2 on two, which one then goes on from with 1 x 4."""
    together, apart = ((tmp_path / name, "--share_rollout") for name in ("together", "apart"))
    settings = {"prompt_file": prompts, **SIX_STEPS}
    run_here(*script_arguments(*together, **settings, train_batch_size=4, gradient_accumulation_steps=1))
    settings["train_batch_size"] = 1
    run_command(*TORCHRUN, *script_arguments(*apart, **settings | {"max_train_images": 12}))
    resumed = {"gradient_accumulation_steps": 4, "resume_from_checkpoint": "latest"}
    run_here(*script_arguments(*apart, **settings, **resumed))
    same_run(together[0], apart[0])
    same_checkpoint(apart[0], together[0])
    networks = [networks_in(run / "checkpoint-24") for run in (one, together[0])]
    assert largest_difference(*networks) > 1e-4  # it is another training


def test_two_processes_are_one(one, prompts, tmp_path):
    """Six steps of 1 image x 2 micro-batches x 2 processes."""
    arguments = script_arguments(tmp_path / "two", prompt_file=prompts, train_batch_size=1, **SIX_STEPS)
    run_command(*TORCHRUN, *arguments)
    cache_one, cache_two = (sorted((run / "conditioning").glob("[!.]*")) for run in (one, tmp_path / "two"))
    assert len(cache_one) == 5  # the index, three shards of prompts (each process wrote its own), one negative prompt
    assert {p.name: p.read_bytes() for p in cache_one} == {p.name: p.read_bytes() for p in cache_two}
    same_run(one, tmp_path / "two")
    same_checkpoint(tmp_path / "two", one)


@pytest.mark.parametrize("change", ["four micro-batches", "gradient checkpointing", "one shard, offloaded"])
def test_what_changes_memory_changes_nothing_else(change, one, prompts, tmp_path):
    changes = {
        "four micro-batches": {"train_batch_size": 1, "gradient_accumulation_steps": 4},
        "gradient checkpointing": {},
        "one shard, offloaded": {"sharding": "full"},
    }[change]
    flags = {"gradient checkpointing": ["--gradient_checkpointing"], "one shard, offloaded": ["--cpu_offload"]}
    arguments = {"prompt_file": prompts, "conditioning_cache_dir": one / "conditioning", **SIX_STEPS, **changes}
    run_here(*script_arguments(tmp_path / "run", *flags.get(change, []), **arguments))
    same_run(one, tmp_path / "run")
    same_checkpoint(tmp_path / "run", one)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("sd3", None),
        ("chroma", "computes something else in ChromaTransformer2DModel"),
        ("lumina", "cannot recompute the activations of LuminaNextDiT2DModel"),
    ],
)
def test_gradient_checkpointing_that_changes_the_result(name, refused):
    """In the installed diffusers, Chroma's leaves out the mask of the text, and Lumina has none."""
    teacher = learned(name)
    conditional, _ = encode_prompts(teacher.pipeline, teacher.contract, ["red circle"])
    noise = sample_noise(teacher.contract.latent_shape, seed=0, step=0, purpose="check", indices=[0])

    def predict(network):
        return teacher.contract.velocity(network, noise, torch.tensor([0.5]), conditional)

    network = copy.deepcopy(teacher.pipeline.transformer)
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        check_gradient_checkpointing(network, predict)


def test_sharded_is_unsharded(one, sharded):
    same_run(one, sharded)
    same_checkpoint(sharded, one)
    assert len(list((sharded / "checkpoint-24").glob("*.distcp"))) == 2  # each process wrote what it held
    assert (sharded / "validation" / "images-24.png").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_saved_on_two_processes_resumed_on(processes, one, sharded, prompts, tmp_path):
    """Without shards on one process, and on two in the shards of several machines, offloaded."""
    shutil.copytree(sharded, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-24", "student"))
    arguments = {"prompt_file": prompts, "resume_from_checkpoint": "latest", **SIX_STEPS}
    if processes == 1:
        run_here(*script_arguments(tmp_path / "run", **arguments))
    else:
        hybrid = {"train_batch_size": 1, "sharding": "hybrid"}
        run_command(*TORCHRUN, *script_arguments(tmp_path / "run", "--cpu_offload", **arguments, **hybrid))
    same_run(one, tmp_path / "run")
    same_checkpoint(tmp_path / "run", one)


TWO_FORKED = """
import math, os, signal, sys
from hf_flowdistill.errors import exit_on_user_error
from score_distillation import train_sid_dit

port, trouble, *arguments = sys.argv[1:]
child = os.fork()
rank = int(child == 0)
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
generator_turn, calls = train_sid_dit.generator_turn, iter(range(100))

def troubled(*inputs):
    loss, metrics = generator_turn(*inputs)
    call = next(calls)
    if trouble == "signal" and call == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return loss * (math.nan if trouble == "nan" and (call == 1 or call > 2) else 1), metrics

if rank == 1:
    train_sid_dit.generator_turn = troubled
try:
    exit_on_user_error(train_sid_dit.main)(arguments)
    code = 0
except SystemExit as error:
    print(error, file=sys.stderr)
    code = error.code if isinstance(error.code, int) else 1
if rank == 1:
    os._exit(code)
print("exit codes", code, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run_two(trouble, output_dir, **settings):
    """The script on two processes, of which one has trouble. They are forked: imports take longer than the rest."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "max_train_images": 100, **settings}
    return run_command("-c", TWO_FORKED, port, trouble, *script_arguments(output_dir, sharding="full", **settings))


def test_a_nan_on_one_process_of_two(tmp_path):
    """Both skip the second step, and stop after five in a row; shards of bfloat16 weights."""
    done = run_two("nan", tmp_path / "run", weight_dtype="bfloat16")
    assert done.stdout.splitlines()[-1] == "exit codes 1 1"
    assert done.stderr.count("not finite in 5 steps in a row, up to 32 images: lower the learning rates") == 2
    assert [line["skipped_updates"] for line in metrics(tmp_path / "run")] == [0, 1, 1, 2, 3, 4, 5]
    generators = []
    for images in (4, 8, 12):
        network = load_pipeline(saved_teacher("stable_diffusion_3")).transformer.bfloat16()
        load_checkpoint(tmp_path / "run" / f"checkpoint-{images}", networks={"generator": network}, optimizers={})
        generators.append(network.state_dict())
    assert largest_difference(*generators[:2]) == 0 and largest_difference(*generators[1:]) > 0


def test_a_signal_to_one_process_of_two(tmp_path):
    """Both stop after that step, with a checkpoint and without an error; shards under autocast."""
    done = run_two("signal", tmp_path / "run", mixed_precision="bf16", checkpointing_images=0)
    assert done.stdout.splitlines()[-1] == "exit codes 0 0"
    assert "checkpoint-8 is written, go on with --resume_from_checkpoint latest" in done.stderr
    assert find_resume(tmp_path / "run", "latest") == tmp_path / "run" / "checkpoint-8"
    assert len(metrics(tmp_path / "run")) == 2 and not (tmp_path / "run" / "student").exists()


def test_processes_that_do_not_see_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world_size(2)
    with pytest.raises(UserError, match="started 2 processes but this one counts 1"):
        check_world_size(1)


def test_processes_that_accelerate_did_not_start(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` starts one, with this environment, and says nothing."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_world_size(1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="asked for several processes but started one: on CPUs launch with"):
        check_world_size(1)


@pytest.mark.parametrize(
    ("name", "processes", "machines"),
    [("1_gpu", 1, 1), ("2_gpus", 2, 1), ("4_gpus", 4, 1), ("8_gpus", 8, 1), ("2_nodes", 16, 2)],
)
def test_configurations_of_accelerate(name, processes, machines):
    config = load_config_from_file(str(SCRIPT.parent / "accelerate_configs" / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.distributed_type == ("MULTI_GPU" if processes > 1 else "NO") and not config.use_cpu
    assert (config.main_process_ip is not None) == (machines > 1)  # without it the machines do not find each other


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
        with pytest.raises(UserError, match=f"{kind} was launched, but the script shards by itself: launch with"):
            check_accelerator(accelerator("bf16", kind))
