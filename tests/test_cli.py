# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The command `flowdistill`: what it prints, and how it refuses."""

import configparser
import importlib
import json
import shlex

import pytest
import tiny_pipelines
from score_distillation.train_sid_dit import parse_args
from training_helpers import PIPELINE_KWARGS, ROOT, folder, quiet, run_command, saved_teacher

from hf_flowdistill.cli import COUNT, POSITIVE, ArgumentParser, json_object, main
from hf_flowdistill.errors import UserError
from hf_flowdistill.planning import kept


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "folder", lambda: tmp_path / "plans")


def test_arguments_that_would_be_ignored(tmp_path):
    """On the command line whatever else is given; in a file if it is so in the file alone. A default is not given."""
    parser = ArgumentParser(prog="script")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--sharp", action="store_true")
    parser.refuse(("size sharp", lambda args: args.sizes, "is of one size: leave it out."))
    file = tmp_path / "config.yaml"
    for words, text in ((["--sizes=1"], ""), (["--size=8"], ""), (["--sizes=1"], "size: 4\nsharp: true")):
        file.write_text(text)
        assert parser.parse_args([f"--config={file}", *words]).size in (4, 8)
    for words, text, name in (
        (["--size=8", "--sizes", "1"], "", "size"),
        (["--sharp"], "sizes: [1]", "sharp"),
        ([], "sizes: [1]\nsize: 0", "size"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"--{name} is of one size: leave it out."):
            parser.parse_args([f"--config={file}", *words])


def printed(capsys, *words):
    main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("teacher", "lines"),
    [
        (
            "stable_diffusion_3",
            [
                "pipeline: StableDiffusion3Pipeline",
                "time: timestep = 1000 * sigma",
                "velocity: output",
                "guidance: doubled, unconditional first",
                "embedded guidance: none",
                "sharding units: 2 JointTransformerBlock, with 79.9% of the parameters",
                "kept for each prompt: encoder_hidden_states [272, 32], pooled_projections [32]; 34,944 bytes",
            ],
        ),
        ("sana", ["latent: hidden_states [4, 8, 8]", "size: 32x32"]),
        ("flux", ["time: timestep = sigma", "guidance: two calls, conditional first", "embedded guidance: guidance"]),
    ],
)
def test_inspect_prints_the_contract(teacher, lines, capsys):
    kwargs = json.dumps(PIPELINE_KWARGS.get(teacher, {}))
    found = printed(capsys, "inspect", saved_teacher(teacher), "--resolution=32", f"--pipeline_kwargs={kwargs}")
    assert set(lines) <= set(found)
    (error,) = (float(line.split(": ")[1]) for line in found if line.startswith("replay error: "))
    assert error < 1e-4


@pytest.fixture(scope="module")
def one_block():
    """A teacher of which every rehearsal is short."""
    pipeline = tiny_pipelines.stable_diffusion_3()
    config = dict(pipeline.transformer.config) | {"num_layers": 1}
    pipeline.register_modules(transformer=type(pipeline.transformer).from_config(config))
    with quiet():
        pipeline.save_pretrained(folder() / "one_block")
    return folder() / "one_block"


def test_plan_lists_every_choice_and_what_fits(one_block, tmp_path, capsys):
    """On two GPUs that hold a sharded training of the tiny teacher, but not a whole one."""
    words = ("--resolution=32", "--pipeline_kwargs", json.dumps({"max_sequence_length": 16}))
    path, file = one_block, tmp_path / "plan.json"
    plan = ("plan", path, "--gpus=2", *words, f"--output_file={file}")
    whole = printed(capsys, *plan, "--memory=80")
    choices = json.loads(file.read_text())
    rows = [line for line in whole if line.startswith(("| full ", "| lora ", "| lora_fake "))]
    of_networks, of_loras, of_quantized = 3 * 3 * 3, 2 * 2 * 3, 2 * 3  # precisions, shardings, checkpointing
    assert len(choices) == len(rows) == 2 * of_networks + of_loras + of_quantized
    assert all(choice["fits"] for choice in choices)
    commands = [line for line in whole if line.startswith("accelerate launch -q --multi_gpu --num_processes 2 ")]
    assert commands == [choice["command"] for choice in choices]
    assert f"--pretrained_model_name_or_path {path} " in commands[0] and "--mixed_precision bf16" in commands[0]
    for command in commands:  # each is one that the script takes
        parse_args(shlex.split(command.partition("train_sid_dit.py ")[2]))

    def find(checkpointing, networks="full", base="none", **wanted):
        wanted |= {"gradient_checkpointing": checkpointing, "networks": networks, "base_quantization": base}
        (choice,) = (c for c in choices if all(c[name] == value for name, value in wanted.items()))
        return choice

    for precision in ("AMP", "BF16"):
        none, full, waiting = (
            find("all", precision=precision, sharding=sharding) for sharding in ("none", "full", "full, offloaded")
        )
        parts, halves = none["peak"]["components"], full["peak"]["components"]
        assert halves["generator"] == parts["generator"] / 2
        networks = "teacher", "generator", "fake score", "average of the generator"
        stays = {"teacher", "activations", "gathered", *(f"{name} (buffers)" for name in networks)}
        assert set(waiting["peak"]["components"]) == stays
        assert none["main_memory"] == full["main_memory"] == 0 < waiting["main_memory"]
        assert none["peak_bytes"] == sum(parts.values())
        some = find("generator, fake score", precision=precision, sharding="none")["peak"]["components"]
        saved = find("none", precision=precision, sharding="none")["peak"]["components"]
        assert parts["activations"] <= some["activations"] < saved["activations"]
    half, whole = (find("all", precision=one, sharding="none")["peak"]["components"] for one in ("BF16", "AMP"))
    assert half["teacher"] == whole["teacher"] / 2
    nearest = find("all", precision="BF16, nearest", sharding="none")["peak"]["components"]
    assert half["Adam's moments"] == pytest.approx(2 * nearest["Adam's moments"], rel=0.01)  # they count steps too

    # adapters are whole in every process, what they are on is not
    alone, shared = (
        find("all", "lora", precision="BF16", sharding=sharding)["peak"]["components"] for sharding in ("none", "full")
    )
    assert alone["teacher"] == half["teacher"] == 2 * shared["teacher"]
    assert alone["teacher (buffers)"] == shared["teacher (buffers)"] > 0
    assert alone["generator (LoRA)"] == shared["generator (LoRA)"]
    teachers = {base: find("all", "lora", base, sharding="none", precision="BF16") for base in ("8bit", "nf4")}
    small, smaller = (teachers[base]["peak"]["components"]["teacher"] for base in ("8bit", "nf4"))
    assert smaller < small < alone["teacher"]
    mixed = find("all", "lora_fake", precision="BF16", sharding="full, offloaded")["peak"]["components"]
    assert "fake score (LoRA)" in mixed and "generator" not in mixed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus=0"], "--gpus is 0: it must be above 0."),
        (["--memory=-1"], "--memory is -1: it must be above 0."),
        (["--train_batch_size", "2", "0"], "--train_batch_size is 0: it must be above 0."),
        (["--output_file=/no/such/place.json"], "--output_file /no/such/place.json is in no folder that exists."),
        (["--output_file=/"], "--output_file / cannot be written: name another file."),
        (["--guidance_mode=both", "--resolution=32"], "embeds no guidance scale: its guidance mode must be cfg."),
        (["--resolution=36"], "have to be divisible by 8 but are 36 and 36"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(words, said, capsys):
    with pytest.raises(SystemExit) as exit:
        printed(capsys, "plan", saved_teacher("stable_diffusion_3"), *words)
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


def test_nothing_fits(one_block, capsys):
    words = "--networks=full --resolution=32 --share_rollout --pipeline_kwargs".split()
    more = *words, json.dumps({"max_sequence_length": 16})
    lines = printed(capsys, "plan", one_block, "--memory=0.00001", *more)
    assert lines[-1] == "Nothing fits."
    assert all(line.endswith(" no |") for line in lines if line.startswith("| full "))


def test_inspect_asks_for_the_pipelines_own_size(capsys):
    """SD3's 8 latents of 4 pixels each; what is not asked for may come from a file."""
    path = saved_teacher("stable_diffusion_3")
    assert "size: 32x32" in printed(capsys, "inspect", path)
    config = folder() / "inspect.yaml"
    config.write_text("width: 64\npipeline_kwargs: {max_sequence_length: 16}\n")
    found = printed(capsys, "inspect", path, "--config", config)
    assert "size: 32x64" in found
    assert found[-1].startswith("kept for each prompt: encoder_hidden_states [32, 32], ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["inspect"], "the following arguments are required: MODEL_OR_PATH (see flowdistill inspect --help)."),
        (["inspect", "./nowhere"], "nowhere does not exist: give a diffusers pipeline folder or a Hub id."),
        (["inspect", "pixart"], "takes a network that predicts epsilon"),
        (["inspect", "stable_diffusion"], "has a UNet instead of a flow-matching transformer."),
        (["inspect", "stable_diffusion_3", "--resolution=36"], "have to be divisible by 8 but are 36 and 36"),
        (["inspect", "stable_diffusion_3", "--height=0"], "--height is 0: it must be at least 1."),
        (["inspect", "stable_diffusion_3", "--device=abacus"], "--device abacus cannot be used: "),
        (["inspect", "stable_diffusion_3", "--speed=1"], "unrecognized arguments: --speed=1"),
        (["export", "--output_dir=out"], "what to export is missing or given twice"),
        (
            ["export", "./nowhere", "--output_dir=out"],
            "nowhere holds no checkpoint: give the --output_dir of a training.",
        ),
        (["export", "./nowhere", "--output_dir=out", "--num_steps=2"], "--num_steps belong to --from_repo"),
        (
            ["export", "--from_repo=a/b", "--output_dir=out", "--num_steps=0"],
            "--num_steps is 0: it must be at least 1",
        ),
        (["export", "--from_repo=./nowhere", "--output_dir=out"], "neither a folder nor an id on the Hub"),
        (["card", "./nowhere"], "nowhere holds no exported student"),
        (["push", "./nowhere", "--repo_id=me/student"], "nowhere holds no exported student"),
        (["push", "./nowhere"], "the following arguments are required: --repo_id"),
        (["verify", "me/student", "--local_dir=a", "--cache_dir=b"], "leave out --cache_dir"),
        (["verify", "a/b/c"], "'a/b/c' is no repository id"),
        (["expect"], "flowdistill has no command expect: choose one of inspect, plan, export, card, push, verify."),
    ],
)
def test_refusals_are_one_sentence_and_exit_code_2(words, sentence, capsys):
    teachers = {name: str(saved_teacher(name)) for name in words if name.startswith(("pixart", "stable"))}
    with pytest.raises(SystemExit) as exit_info:
        main([teachers.get(word, word) for word in words])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and sentence in captured.err and captured.err.count("\n") == 1


def read_config(text):
    """What a parser with one argument of every kind reads from a config file, and a word behind it."""
    parser = ArgumentParser(prog="paint")
    parser.add_argument("picture", nargs="*")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"))
    parser.add_argument("--width", type=COUNT, default=7)
    parser.add_argument("--rate", type=POSITIVE)
    parser.add_argument("--wet", action="store_true")
    parser.add_argument("--colours", nargs="+", default=[])
    parser.add_argument("--levels", nargs="+", type=float)
    parser.add_argument("--brushes", nargs="*", choices=("flat", "round"), default=False)
    parser.add_argument("--rehearse", nargs="?", type=int, const=0)
    parser.add_argument("--more", type=json_object, default={})
    parser.add_argument("--name")
    file = folder() / "paint.yaml"
    file.write_text(text)
    args = vars(parser.parse_args(["--config", str(file), "sea.png"]))
    assert args.pop("picture") == ["sea.png"] and args.pop("config") == str(file)
    return {name: value for name, value in args.items() if value != parser.get_default(name)}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("mixed_precision: no", {"mixed_precision": "no"}),
        ("wet: true", {"wet": True}),
        ("wet: on", {"wet": True}),
        ("wet: no", {}),
        ("wet: null", {}),
        ("width: null", {}),
        ("rate: 1e-6", {"rate": 1e-6}),
        ("name: no", {"name": "no"}),
        ("name: 1.50", {"name": "1.50"}),
        ("name: 'true'", {"name": "true"}),
        ("name: 2026-01-01", {"name": "2026-01-01"}),
        ("colours: [yes, 12:30, 010, 1e3]", {"colours": ["yes", "12:30", "010", "1e3"]}),
        ("colours: red", {"colours": ["red"]}),
        ("colours: []", {}),
        ("levels: [1, 5e-1]", {"levels": [1, 0.5]}),
        ("brushes: true", {"brushes": []}),
        ("brushes: false", {}),
        ("brushes: [flat]", {"brushes": ["flat"]}),
        ("rehearse: yes", {"rehearse": 0}),
        ("rehearse: 8", {"rehearse": 8}),
        ("more: {a: 1e-6, b: 12:30, c: [010], d: true}", {"more": {"a": 1e-6, "b": "12:30", "c": [10], "d": True}}),
        ("more: '{\"a\": 1}'", {"more": {"a": 1}}),
        ("", {}),
    ],
)
def test_a_config_file_is_read_as_the_text_that_it_is(text, read):
    assert read_config(text) == read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mixed_precision: false", "gives mixed_precision false, which is no value of it: put it in quotes"),
        ("name: true", "gives name true, which is no value of it: put it in quotes"),
        ("rate: true", "gives rate true, which is no value of it"),
        ("rate:", "gives rate no value: give one, or null for the default"),
        ("rate: 12:30", "argument --rate: invalid float value: '12:30'"),
        ("rate: [1]", "gives rate a list, but it takes one value"),
        ("rate: 1\nrate: 2", "has rate more than once"),
        ("wet: 1", "gives wet 1, but it is a switch: give true or false"),
        ("wet: [true]", "gives wet a list, but it is a switch"),
        ("colours: [red, ~]", "gives colours ~, which is no value of it"),
        ("colours: [red, [blue]]", "gives colours a list with lists or names in it"),
        ("levels: []", "gives levels an empty list: name some, or leave the line out"),
        ("brushes: []", "gives brushes an empty list: name some, or leave the line out"),
        ("name: {a: 1}", "gives name names with values, but it takes none"),
        ("more: [1]", "gives more a list, but it takes one value"),
        ("more: {a: no}", "gives more a bare no: write true or false, or put it in quotes"),
        ("more: {a: 1, a: 2}", "gives more a name more than once"),
        ("more: {a: !!set {b}}", "gives more something that JSON cannot say"),
        ("mixed-precision: bf16", "has unknown arguments: mixed-precision (write mixed_precision)"),
        ("--rate: 1", "has unknown arguments: --rate (write rate)"),
        ("config: other.yaml", "has unknown arguments: config"),
        ("rate: 1\n---\nrate: 2", "cannot be read: expected a single document"),
    ],
)
def test_what_a_config_file_cannot_mean_is_refused(text, said):
    with pytest.raises(UserError) as error:
        read_config(text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_help(capsys):
    for words in ([], ["--help"]):
        assert any(line.startswith("  inspect ") for line in printed(capsys, *words))
    with pytest.raises(SystemExit) as exit_info:
        main(["inspect", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "MODEL_OR_PATH" in text and "None" not in text and max(map(len, text.splitlines())) <= 119


def test_the_console_script_is_this_command():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, target = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    assert name == "flowdistill" and getattr(importlib.import_module(module), function) is main
    done = run_command("-m", module, "inspect", saved_teacher("pixart"), check=False)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
