# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Two processes compute what one does."""

import contextlib
import copy
import json
import math
import socket
from types import SimpleNamespace

import pytest
import tiny_teachers
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from stand_in_pairs import open_images, open_pairs
from teacher_cases import learned
from training_helpers import (
    SCRIPT,
    folder,
    largest_difference,
    metrics,
    networks_in,
    optimizers_in,
    quiet,
    run_command,
    run_here,
    saved_student,
    saved_teacher,
    script_arguments,
)

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.draws import sample_noise
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.networks.roles import Networks, RoleSettings, check_gradient_checkpointing
from hf_flowdistill.teachers import encode_prompts
from hf_flowdistill.training import run as run_module
from hf_flowdistill.training.checkpointing import find_resume, load_checkpoint
from hf_flowdistill.training.distributed import check_accelerator, check_world_size
from hf_flowdistill.training.ema import EMA
from hf_flowdistill.training.optimizers import build_optimizer


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT)
SEVERAL_RUNS = """
import json, sys
from accelerate.state import PartialState
from hf_flowdistill.training import run
from score_distillation import train_sid_dit
from stand_in_pairs import open_images, open_pairs
from training_helpers import reset_accelerate

run.open_images, run.open_pairs = open_images, open_pairs
PartialState.destroy_process_group = lambda *_: None  # the next run's too: imports take longer than all runs
for arguments in json.loads(sys.argv[1]):
    reset_accelerate()
    train_sid_dit.main(arguments)
"""

SIX_STEPS = {"max_train_images": 24, "checkpointing_images": 12, "learning_rate": 3e-4}
LORA = {"rank": 4, "fake_score_learning_rate": 3e-3}
KINDS = {
    "full": {},
    "lora_fake": {"networks": "lora_fake", **LORA},
    "lora": {"networks": "lora", **LORA, "learning_rate": 3e-3},
    "one rollout": {},  # with --share_rollout
    "text of any length": {},  # with its own teacher and prompts, see below
    "adversarial": {  # with --adversarial; the generator rests for one step
        "prompt_file": None,
        "dataset_name": "none",
        "discriminator_warmup_images": 4,
        "adversarial_start_images": 4,
    },
}
EQUAL = {  # how six steps of four images on one process are divided: processes, and arguments
    "two processes": (2, ["--train_batch_size=1"]),
    "shards": (
        2,
        """--train_batch_size=1 --sharding=full --gradient_checkpointing --validation_prompts square
        --validation_images=12""".split(),
    ),
    "shards of one machine": (2, ["--train_batch_size=1", "--sharding=hybrid", "--cpu_offload", "FROM SHARDS"]),
    "whole again": (1, ["FROM SHARDS"]),
    "one image at a time": (
        1,
        ["--train_batch_size=1", "--gradient_accumulation_steps=4", "--gradient_checkpointing"],
    ),
    "one shard": (1, ["--sharding=full", "--cpu_offload"]),
    "two images at a time": (2, ["--gradient_accumulation_steps=1", "--sharding=full"]),
}
CASES = [("full", "two processes"), ("one rollout", "two processes"), ("one rollout", "one image at a time")]
CASES += [(kind, name) for kind in ("full", "lora_fake", "lora") for name in list(EQUAL)[1:-1]]
CASES += [("text of any length", "two images at a time")]
CASES += [("adversarial", "one image at a time"), ("adversarial", "two images at a time")]


@pytest.fixture(autouse=True, scope="module")
def stand_in():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "open_images", open_images)
        patch.setattr(run_module, "open_pairs", open_pairs)
        yield


@pytest.fixture(scope="module")
def line_of(tmp_path_factory):
    """kind, name, arguments -> the folder of a run and its command line."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"{number} squares" for number in range(150)) + "\n")
    KINDS["text of any length"] |= {
        "pretrained_model_name_or_path": folder / "qwen_image",
        "prompt_file": folder / "of_any_length.txt",
    }
    (folder / "of_any_length.txt").write_text("red circle\nblue square\na green ring beside two large red squares\n")
    with quiet():
        tiny_teachers.qwen_image().save_pretrained(folder / "qwen_image")

    def line(kind, name, arguments):
        settings = {"prompt_file": prompts, **SIX_STEPS, **KINDS[kind]}
        if name not in ("one", "two processes"):
            settings["conditioning_cache_dir"] = folder / kind / "conditioning"
        resume = f"--resume_from_checkpoint={folder / kind / 'shards' / 'checkpoint-12'}"
        arguments = [resume if argument == "FROM SHARDS" else argument for argument in arguments]
        if kind == "one rollout":
            arguments.append("--share_rollout")
        if kind == "adversarial":
            arguments += ["--adversarial", f"--student_model_name_or_path={saved_student()}"]
        if kind == "lora" and "--cpu_offload" in arguments:  # there is nothing to offload
            arguments.remove("--cpu_offload")
        return folder / kind / name, script_arguments(folder / kind / name, *arguments, **settings)

    return line


@pytest.fixture(scope="module")
def one(line_of):
    """kind -> the run of four images at a time on one process."""
    runs = {}
    for kind in KINDS:
        runs[kind], line = line_of(kind, "one", ["--train_batch_size=4", "--gradient_accumulation_steps=1"])
        run_here(*line)
    return runs


@pytest.fixture(scope="module")
def two(line_of, one):
    """(kind, name) -> the run on two processes; real launches, as few as possible."""
    runs = {
        (kind, name): line_of(kind, name, arguments)
        for name, (processes, arguments) in EQUAL.items()
        for kind in KINDS
        if processes == 2 and (kind, name) in CASES
    }
    program = folder() / "several_runs.py"
    program.write_text(SEVERAL_RUNS)
    run_command(*TORCHRUN[:-1], program, json.dumps([line for _, line in runs.values()]))
    return {case: output_dir for case, (output_dir, _) in runs.items()}


def trained(kind):
    """The networks that a checkpoint of this kind holds, as they are at the start."""
    path = KINDS[kind].get("pretrained_model_name_or_path", saved_teacher("stable_diffusion_3"))
    roles = RoleSettings(KINDS[kind].get("networks", "full"), rank=4)
    networks = Networks.from_teacher(load_pipeline(path).transformer, roles=roles)
    return {**networks.trained(), "ema": EMA(networks.generator).model}


def tensors(networks):
    return {f"{name}.{key}": tensor for name in networks for key, tensor in networks[name].state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_six_steps_move_weights(kind, one):
    start, end = tensors(trained(kind)), networks_in(one[kind] / "checkpoint-24")
    for network in ("generator", "fake_score", "ema"):
        first, last = ({key: where[key] for key in end if key.startswith(network)} for where in (start, end))
        assert largest_difference(first, last) > 1e-3


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_changes_nothing(kind, name, one, two, line_of):
    """Processes, shards, micro-batches and checkpointed activations: the same student, metrics and last checkpoint."""
    if (kind, name) in two:
        run = two[kind, name]
    else:
        run, line = line_of(kind, name, EQUAL[name][1])
        run_here(*line)
    students = [
        load_file(path / "student/transformer/diffusion_pytorch_model.safetensors") for path in (run, one[kind])
    ]
    assert largest_difference(*students) < 1e-6
    lines = metrics(run)
    others = metrics(one[kind])[-len(lines) :]
    assert len(lines) == (3 if "FROM SHARDS" in EQUAL[name][1] else 6)
    for line, other in zip(lines, others, strict=True):
        for key in line.keys() - {"images_per_second", "processes"}:
            # where the generator goes first, its first gradient is rounding: fake score and teacher are still one
            rest = 1e-5 if key == "generator_grad_norm" else 1e-6
            assert math.isclose(line[key], other[key], rel_tol=1e-3, abs_tol=rest), key
    same_checkpoint(kind, run, one[kind])


def same_checkpoint(kind, run, expected):
    """Networks and optimizers of the last checkpoint of `run`, which may be of shards, against a whole one."""
    networks = trained(kind)
    optimizers = {name: build_optimizer(networks[name]) for name in ("generator", "fake_score")}
    state = load_checkpoint(run / "checkpoint-24", networks=networks, optimizers=optimizers)
    assert (state["images_seen"], state["step"], state["skipped_updates"]) == (24, 6, 0)
    assert largest_difference(tensors(networks), networks_in(expected / "checkpoint-24")) < 1e-6
    for name, saved in optimizers_in(expected / "checkpoint-24").items():
        moments = optimizers[name.removesuffix("_optimizer")].state_dict()["state"]
        assert moments.keys() == saved["state"].keys()
        steps = 5 if kind == "adversarial" and name == "generator_optimizer" else 6
        for index, values in saved["state"].items():
            assert moments[index]["step"] == values["step"] == steps
            torch.testing.assert_close(moments[index]["exp_avg_sq"], values["exp_avg_sq"], rtol=1e-3, atol=1e-6)


def test_a_shared_rollout_is_another_training(one):
    networks = [networks_in(one[kind] / "checkpoint-24") for kind in ("full", "one rollout")]
    assert largest_difference(*networks) > 1e-4


def test_what_two_processes_write(one, two):
    """A part each, which is the same together."""
    caches = [sorted((run / "conditioning").glob("[!.]*")) for run in (one["full"], two["full", "two processes"])]
    assert len(caches[0]) == 5  # the index, three shards of prompts, one negative prompt
    assert len({tuple((p.name, p.read_bytes()) for p in cache) for cache in caches}) == 1
    for kind, files in (("full", 2), ("lora_fake", 2), ("lora", 0)):
        run = two[kind, "shards"]
        assert len(list((run / "checkpoint-24").glob("*.distcp"))) == files
        assert (run / "validation" / "images-24.png").exists()


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


TWO_FORKED = """
import math, os, signal, sys
from hf_flowdistill.errors import exit_on_user_error
from hf_flowdistill.methods import sid
from score_distillation import train_sid_dit

port, trouble, *arguments = sys.argv[1:]
child = os.fork()
rank = int(child == 0)
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
generator_turn, calls = sid.generator_turn, iter(range(100))

def troubled(*inputs):
    loss, metrics = generator_turn(*inputs)
    call = next(calls)
    if trouble == "signal" and call == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return loss * (math.nan if trouble == "nan" and (call == 1 or call > 2) else 1), metrics

if rank == 1:
    sid.generator_turn = troubled
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
    for kind in ("DEEPSPEED", "MEGATRON_LM"):
        with pytest.raises(UserError, match=f"{kind} was launched, but the script shards by itself: launch with"):
            check_accelerator(accelerator("bf16", kind))
