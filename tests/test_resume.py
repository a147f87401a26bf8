# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Stopping, going on and being killed, through the real script and the real launcher: the bits are the same."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from stand_in_pairs import open_images, open_pairs
from training_helpers import (
    SCRIPT,
    metrics,
    networks_in,
    optimizers_in,
    run_command,
    run_here,
    saved_student,
    script_arguments,
)

from hf_flowdistill.errors import exit_on_user_error
from hf_flowdistill.methods import sid
from hf_flowdistill.training import run as run_module
from hf_flowdistill.training.folders import latest_checkpoint


CONFIG = SCRIPT.parent / "accelerate_configs" / "cpu.yaml"
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", CONFIG, SCRIPT)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Four steps of four images in one go."""
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_command(*LAUNCH, *script_arguments(output_dir, max_train_images=16))
    return output_dir


def same_bits(first, second):
    """Compare two checkpoints: networks, optimizers and state."""
    networks, others = networks_in(first), networks_in(second)
    assert networks.keys() == others.keys()
    assert all(torch.equal(networks[name], others[name]) for name in networks)
    optimizers, others = optimizers_in(first), optimizers_in(second)
    for name, optimizer in optimizers.items():
        assert optimizer["param_groups"] == others[name]["param_groups"]
        for index, state in optimizer["state"].items():
            assert all(torch.equal(state[key], others[name]["state"][index][key]) for key in state)
    assert Path(first, "state.json").read_text() == Path(second, "state.json").read_text()


def same_metrics(first, second):
    def lines(output_dir):
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in metrics(output_dir)]

    assert lines(first) == lines(second)


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_shared_rollout_resumes_to_the_same_bits(adversarial, tmp_path, monkeypatch):
    """The adversarial stage too, in the middle of a part of its images."""
    monkeypatch.setattr(run_module, "open_images", open_images)
    monkeypatch.setattr(run_module, "open_pairs", open_pairs)
    more, gate = ["--share_rollout"], {}
    if adversarial:
        more += ["--adversarial", f"--student_model_name_or_path={saved_student()}"]
        gate = {"prompt_file": None, "dataset_name": "none"}
        gate |= {"discriminator_warmup_images": 4, "adversarial_start_images": 4}
    whole, parts = ((tmp_path / name, *more) for name in ("whole", "parts"))
    run_here(*script_arguments(*whole, max_train_images=12, **gate))
    run_here(*script_arguments(*parts, max_train_images=8, **gate))
    run_here(*script_arguments(*parts, max_train_images=12, resume_from_checkpoint="latest", **gate))
    same_bits(whole[0] / "checkpoint-12", parts[0] / "checkpoint-12")
    same_metrics(whole[0], parts[0])


def test_four_steps_are_two_and_two_more(uninterrupted, tmp_path):
    output_dir = tmp_path / "run"
    run_command(*LAUNCH, *script_arguments(output_dir, max_train_images=8))
    run_command(*LAUNCH, *script_arguments(output_dir, max_train_images=16, resume_from_checkpoint="latest"))
    same_bits(uninterrupted / "checkpoint-16", output_dir / "checkpoint-16")
    same_metrics(uninterrupted, output_dir)
    first, last = networks_in(output_dir / "checkpoint-4"), networks_in(output_dir / "checkpoint-16")
    assert all(
        not torch.equal(first[f"{n}.proj_out.weight"], last[f"{n}.proj_out.weight"]) for n in ("ema", "generator")
    )


KILLED_WHILE_SAVING = """
import os, signal, sys
from hf_flowdistill.training import checkpoint_files
from score_distillation.train_sid_dit import main

save = checkpoint_files.save_model

def save_half(network, file):
    save(network, file)
    if "checkpoint-12" in file and "fake_score" in file:
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint_files.save_model = save_half
main(sys.argv[1:])
"""


KILLED_WHILE_ENCODING = """
import os, signal, sys
from hf_flowdistill.data import shards
from score_distillation.train_sid_dit import main

save = shards.save_file

def save_half(tensors, path, metadata):
    save(tensors, path, metadata)
    if any(path.parent.glob("shard-*")):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

shards.save_file = save_half
main(sys.argv[1:])
"""


def conditioning_in(output_dir):
    return {path.name: path.read_bytes() for path in (output_dir / "conditioning").glob("[!.]*")}


def test_killed_while_encoding(uninterrupted, tmp_path):
    """In the middle of the second shard; the next run encodes that one, and trains as if nothing had been."""
    arguments = script_arguments(tmp_path / "run", max_train_images=4)
    killed = run_command("-c", KILLED_WHILE_ENCODING, *arguments, check=False)
    assert killed.returncode == -signal.SIGKILL
    whole, half = conditioning_in(uninterrupted), conditioning_in(tmp_path / "run")
    assert len(whole) == len(half) == 3
    assert set(half) - set(whole) == {"unfinished-0.tmp"}
    run_command(SCRIPT, *arguments, "--resume_from_checkpoint=latest")
    assert conditioning_in(tmp_path / "run") == whole
    same_bits(uninterrupted / "checkpoint-4", tmp_path / "run" / "checkpoint-4")


def test_killed_in_the_middle_of_a_checkpoint(uninterrupted, tmp_path):
    output_dir = tmp_path / "run"
    arguments = script_arguments(output_dir, max_train_images=16, checkpoints_total_limit=1)
    killed = run_command("-c", KILLED_WHILE_SAVING, *arguments, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (output_dir / "checkpoint-12.tmp").is_dir()
    assert latest_checkpoint(output_dir) == output_dir / "checkpoint-8"
    assert len(metrics(output_dir)) == 3

    run_command(SCRIPT, *arguments, "--resume_from_checkpoint=latest")
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-16"]
    same_bits(uninterrupted / "checkpoint-16", output_dir / "checkpoint-16")
    same_metrics(uninterrupted, output_dir)


def in_the_generators_turn(monkeypatch, call, act):
    """Do something in one of the generator's turns, then compute it as ever."""
    generator_turn, calls = sid.generator_turn, iter(range(10**6))

    def turn(*inputs):
        if next(calls) == call:
            act()
        return generator_turn(*inputs)

    monkeypatch.setattr(sid, "generator_turn", turn)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_told_to_stop(name, tmp_path, monkeypatch):
    """In the second step: it is finished and saved, and the run is one that can be gone on with."""
    handler = signal.getsignal(getattr(signal, name))
    arguments = {"max_train_images": 12, "train_batch_size": 4, "gradient_accumulation_steps": 1}
    run_here(*script_arguments(tmp_path / "whole", **arguments))
    with monkeypatch.context() as patch:
        in_the_generators_turn(patch, 1, lambda: os.kill(os.getpid(), getattr(signal, name)))
        run_here(*script_arguments(tmp_path / "run", **arguments, checkpointing_images=0))
    assert signal.getsignal(getattr(signal, name)) == handler
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-8"]
    assert not (tmp_path / "run" / "student").exists()
    run_here(*script_arguments(tmp_path / "run", **arguments, resume_from_checkpoint="latest"))
    same_bits(tmp_path / "whole" / "checkpoint-12", tmp_path / "run" / "checkpoint-12")
    same_metrics(tmp_path / "whole", tmp_path / "run")


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, caplog):
    """The second of three checkpoints does not fit; the run goes on, and the others are there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    arguments = {"max_train_images": 12, "train_batch_size": 4, "gradient_accumulation_steps": 1}
    in_the_generators_turn(monkeypatch, 1, limit(100_000))
    in_the_generators_turn(monkeypatch, 2, limit(soft))
    try:
        run_here(*script_arguments(tmp_path / "run", **arguments))
    finally:
        limit(soft)()
    assert "checkpoint-8 could not be written, the earlier checkpoints are kept" in caplog.text
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-12", "checkpoint-4"]
    assert len(metrics(tmp_path / "run")) == 3 and (tmp_path / "run" / "student").is_dir()


def test_a_disk_without_room_for_a_line(tmp_path, monkeypatch, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    in_the_generators_turn(monkeypatch, 0, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard)))
    with pytest.raises(SystemExit) as stopped:
        try:
            exit_on_user_error(run_here)(*script_arguments(tmp_path / "run"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stopped.value.code == 1
    assert "File too large: free some space and start again." in capsys.readouterr().err


KILLED_AT_ANY_TIME = """
import json, os, random, signal, sys, time
from pathlib import Path
from hf_flowdistill.training.monitors import MetricsFile
from score_distillation import train_sid_dit
from training_helpers import quiet

output_dir, *arguments = sys.argv[1:]
moments = random.Random(0)
write = MetricsFile.write
unfinished, lost = 0, []

for life in range(20):  # forked, as imports take longer than all the rest
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        MetricsFile.write = lambda file, record: (write(file, record), os.write(writer, b"x"))
        try:
            with quiet():
                train_sid_dit.main([*arguments, "--resume_from_checkpoint=latest"])
        finally:
            os._exit(1)
    os.close(writer)
    for _ in range(moments.randrange(1, 4)):  # steps
        assert os.read(reader, 1) == b"x"
    time.sleep(0.05 * moments.random())
    while life % 2 and not any(Path(output_dir).glob("checkpoint-*.tmp")):
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        time.sleep(0.0005)
    time.sleep(0.01 * moments.random())
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    unfinished += any(Path(output_dir).glob("checkpoint-*.tmp"))
    metrics = Path(output_dir, "metrics.jsonl")
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    trained = json.loads(lines[-1])["images_seen"] if lines else 0
    saved = [int(p.name.split("-")[1]) for p in Path(output_dir).glob("checkpoint-*") if not p.name.endswith(".tmp")]
    lost.append(trained - max(saved, default=0))

print(json.dumps({"trained": trained, "lost": lost, "unfinished": unfinished}))
"""


def test_killed_twenty_times(tmp_path):
    """At random moments of training, half of them while a checkpoint is written; what comes of it is the same run."""
    settings = {"num_steps": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1, "checkpointing_images": 2}
    settings["checkpoints_total_limit"] = 2
    arguments = script_arguments(tmp_path / "killed", **settings, max_train_images=10**6)
    killed = run_command("-c", KILLED_AT_ANY_TIME, tmp_path / "killed", *arguments)
    told = json.loads(killed.stdout.splitlines()[-1])
    assert max(told["lost"]) <= settings["checkpointing_images"] and told["unfinished"] > 3
    end = {**settings, "max_train_images": told["trained"] + 4}
    run_command(SCRIPT, *script_arguments(tmp_path / "killed", **end, resume_from_checkpoint="latest"))
    run_command(SCRIPT, *script_arguments(tmp_path / "whole", **end))
    same_metrics(tmp_path / "killed", tmp_path / "whole")
    name = f"checkpoint-{end['max_train_images']}"
    same_bits(tmp_path / "killed" / name, tmp_path / "whole" / name)
