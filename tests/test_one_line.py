# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A teacher's name is enough: its recipe, prompts and layout come by themselves, and what is given wins."""

import io
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from hub_helpers import ROOT, guarded
from loopback_hub import LoopbackHub
from published_teachers import published_teacher
from safetensors.torch import load_file
from score_distillation import train_sid_dit
from training_helpers import SCRIPT, largest_difference, run_command, run_here, saved_teacher
from training_helpers import script_arguments as arguments

from hf_flowdistill.errors import UserError
from hf_flowdistill.planning import fit as fit_module
from hf_flowdistill.planning.cases import SHARDING_PLANS, stage_of
from hf_flowdistill.planning.choices import CHECKPOINTING, SHARE
from hf_flowdistill.planning.fit import _first_that_fits, _measure, fit
from hf_flowdistill.training.fit_arguments import settle
from hf_flowdistill.training.fsdp_config import not_honoured, take_fsdp_config
from hf_flowdistill.training.recipes import parse_with_recipe


RECIPES = SCRIPT.with_name("recipes")
CONFIGS = SCRIPT.with_name("accelerate_configs")
LARGE = "stabilityai/stable-diffusion-3.5-large"
STUDENT = "student/transformer/diffusion_pytorch_model.safetensors"
DATASET = "brivangl/midjourney-v6-llava"
OF = {  # published teacher -> its recipes, by the resolution that is asked for
    ("sana-0.6b-512", None): ["sana_0.6b_512_amp"],
    ("sana-1.6b-512", None): ["sana_1.6b_512_amp"],
    ("sana-sprint-0.6b-1024-teacher", None): ["sana_sprint_0.6b_1024_amp"],
    ("sana-sprint-1.6b-1024-teacher", None): ["sana_sprint_1.6b_1024_amp"],
    ("sd3-medium", None): ["sd3_medium_amp", "sd3_medium_bf16"],
    ("sd3.5-medium", None): ["sd3.5_medium_amp", "sd3.5_medium_bf16"],
    ("sd3.5-large", None): ["sd3.5_large_amp", "sd3.5_large_bf16"],
    ("sd3.5-large", 768): ["sd3.5_large_amp", "sd3.5_large_bf16"],
    ("flux.1-dev", None): ["flux.1_dev_1024_bf16"],
    ("flux.1-dev", 512): ["flux.1_dev_512_bf16"],
}


def parse(words) -> list[Namespace]:
    """What the script knows before it sees accelerators."""
    return parse_with_recipe(train_sid_dit.make_parser(), words, train_sid_dit.check_args, RECIPES)


def candidates(*more, teacher="sd3.5-large"):
    words = [f"--pretrained_model_name_or_path={published_teacher(teacher)}", "--prompt_file=x", "--report_to=none"]
    return parse([*words, *more])


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(("teacher", "resolution"), OF)
def test_a_teacher_gets_the_recipe_of_its_architecture(teacher, resolution, capsys):
    found = candidates(*([f"--resolution={resolution}"] if resolution else []), teacher=teacher)
    names = OF[teacher, resolution]
    assert [args.recipe for args in found] == names
    for args in found:
        recipe = yaml.safe_load((RECIPES / f"{args.recipe}.yaml").read_text())
        del recipe["pretrained_model_name_or_path"]
        asked = {"resolution": resolution} if resolution else {}
        assert {name: getattr(args, name) for name in recipe} == recipe | asked
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"recipe: {' or '.join(names)}, since ")


def test_a_fine_tune_by_path_gets_its_bases_recipe(tmp_path, capsys):
    """Saved by a newer diffusers, which writes every default, and renamed."""
    for file in published_teacher("sd3-medium").rglob("*"):
        if file.is_file():
            there = tmp_path / "mine" / file.relative_to(published_teacher("sd3-medium"))
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(file.read_bytes())
    config = tmp_path / "mine" / "transformer" / "config.json"
    more = {"dual_attention_layers": [], "qk_norm": None, "_name_or_path": "me/mine"}
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    words = [f"--pretrained_model_name_or_path={tmp_path / 'mine'}", "--prompt_file=x", "--report_to=none"]
    assert [args.recipe for args in parse(words)] == ["sd3_medium_amp", "sd3_medium_bf16"]
    assert "stable-diffusion-3-medium-diffusers" in capsys.readouterr().err


def test_a_teacher_that_nobody_knows_gets_the_defaults_at_its_own_resolution(capsys):
    (args,) = parse(
        [
            f"--pretrained_model_name_or_path={saved_teacher('stable_diffusion_3')}",
            "--prompt_file=x",
            "--report_to=none",
        ]
    )
    assert args.recipe == "none" and args.learning_rate == 1e-6
    assert args.resolution == 32  # 8 latents of 4 pixels
    assert capsys.readouterr().err.startswith("recipe: none, since none is of SD3Transformer2DModel of this size")


def test_the_command_line_wins_over_a_config_and_that_over_the_recipe(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("alpha: 1.5\nloss_scale: 7\nresolution: 512\n")
    for args in candidates(f"--config={config}", "--loss_scale=8"):
        assert (args.alpha, args.loss_scale, args.teacher_guidance_scale) == (1.5, 8, 4.5)
        assert (args.resolution, args.num_steps) == (512, 4) and args.recipe.startswith("sd3.5_large")


@pytest.mark.parametrize(
    ("words", "names", "precision"),
    [
        (["--weight_dtype=bfloat16"], ["sd3.5_large_bf16"], ("bfloat16", None, "stochastic", 1e-5)),
        (["--bf16_rounding=nearest"], ["sd3.5_large_bf16"], ("bfloat16", None, "nearest", 1e-5)),
        (["--mixed_precision=bf16"], ["sd3.5_large_amp"], ("float32", "bf16", None, 1e-6)),
        (["--mixed_precision=no"], ["sd3.5_large_amp"], ("float32", "no", None, 1e-6)),
        (["--recipe=sd3.5_large_bf16"], ["sd3.5_large_bf16"], ("bfloat16", None, "stochastic", 1e-5)),
        (["--recipe=none"], ["none"], ("float32", None, None, 1e-6)),
        (["--networks=lora"], ["sd3.5_large_amp", "sd3.5_large_bf16"], ("float32", "bf16", None, 1e-4)),
    ],
)
def test_a_precision_that_is_asked_for_chooses_the_recipe(words, names, precision):
    found = candidates(*words)
    assert [args.recipe for args in found] == names
    args = found[0]
    assert (args.weight_dtype, args.mixed_precision, args.bf16_rounding, args.learning_rate) == precision


def test_what_was_launched_chooses_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    (args,) = candidates()
    assert (args.recipe, args.weight_dtype, args.mixed_precision) == ("sd3.5_large_amp", "float32", None)


def test_several_sizes_or_two_of_three_numbers_leave_a_line_of_the_recipe_out():
    args = candidates("--aspect_ratio_buckets=512,512;512,768")[0]
    assert (args.height, args.width) == (512, 512)
    args = candidates("--train_batch_size=2", "--gradient_accumulation_steps=3")[0]
    settle(args, 2)
    assert args.images_per_update == 12


def test_a_run_goes_on_with_its_recipe(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": "sd3.5_large_bf16"}))
    (args,) = candidates(f"--output_dir={tmp_path / 'run'}", "--resume_from_checkpoint=latest")
    assert args.recipe == "sd3.5_large_bf16"
    assert capsys.readouterr().err == "recipe: sd3.5_large_bf16, as the run that goes on has it\n"


def test_a_recipe_that_there_is_not():
    with pytest.raises(
        UserError, match="--recipe sd4 is none of those here: choose auto, none, flux.1_dev_1024_bf16, "
    ):
        candidates("--recipe=sd4")


# ---------------------------------------------------------------------------------------------------------------- fit


def tiny(*more):
    words = arguments("run", "--images_per_update=16", train_batch_size=None, gradient_accumulation_steps=None)
    return parse([*words, *more])[0]


def test_numbers_of_an_update():
    for processes, given, expected in [
        (1, {}, (2, 128, 256)),
        (8, {"images_per_update": 256}, (2, 16, 256)),
        (3, {"images_per_update": 256}, (1, 85, 255)),
        (2, {"images_per_update": 12, "train_batch_size": 3}, (3, 2, 12)),
        (2, {"gradient_accumulation_steps": 4}, (32, 4, 256)),
        (2, {"train_batch_size": 5, "gradient_accumulation_steps": 7}, (5, 7, 70)),
    ]:
        names = ("train_batch_size", "gradient_accumulation_steps", "images_per_update")
        args = Namespace(**dict.fromkeys((*names, "sharding", "cpu_offload", "gradient_checkpointing")) | given)
        for _ in range(2):  # what is settled stays so
            settle(args, processes)
            assert tuple(getattr(args, name) for name in names) == expected
    args = tiny("--train_batch_size=2", "--gradient_accumulation_steps=3")
    with pytest.raises(UserError, match="--images_per_update is 16, but 2 processes x 3 micro-batches x 2 images"):
        settle(args, 2)


# kind -> --sharding and --cpu_offload
SHARDINGS = {kind: ("full" if shards else "none", offloaded) for kind, (shards, offloaded) in SHARDING_PLANS.items()}
NEEDED = {"none": 100, "full": 50, "full, offloaded": 20}
ADAPTED = {("full", "none"): 1, ("lora_fake", "none"): 0.8, ("lora", "none"): 0.2, ("lora", "nf4"): 0.1}


@pytest.fixture
def stand_in_rehearsal(monkeypatch):
    """Memory by a rule: the less is in shards or checkpointed, the more; each image of a micro-batch a tenth more."""

    def measure(stage, args, processes, memory, kind, checkpointed, batch_size):
        whole = NEEDED[kind] * (4 - len(checkpointed)) * (0.9 + 0.1 * batch_size)
        return whole * ADAPTED[args.networks, args.base_quantization] * (1 if args.weight_dtype == "float32" else 0.7)

    monkeypatch.setattr(fit_module, "_measure", measure)
    monkeypatch.setattr(fit_module, "stage_of", lambda args: None)
    return measure


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("precisions", [["float32"], ["float32", "bfloat16"]])
def test_what_fits_is_taken_in_the_order_of_the_time_it_costs(processes, precisions, stand_in_rehearsal):
    """For every memory: what is chosen fits, and what comes before it does not, with one image at a time."""
    found = [tiny(f"--weight_dtype={dtype}") for dtype in precisions]
    ways = [
        (args, kind, names)
        for offloaded in (False, True)
        for args in found
        for names in reversed(CHECKPOINTING.values())
        for kind, (_, off) in SHARDINGS.items()
        if off is offloaded and (processes > 1 or kind != "full")
    ]
    for memory in range(10, 1000):
        sizes = [stand_in_rehearsal(None, args, processes, memory, kind, names, 1) for args, kind, names in ways]
        first = next((i for i, size in enumerate(sizes) if size <= SHARE * memory), None)
        way = _first_that_fits(None, found, processes, memory)
        if first is None:
            assert way is None
            continue
        args, kind, names = ways[first]
        assert (way.args.sharding, way.args.cpu_offload, way.args.weight_dtype) == (
            *SHARDINGS[kind],
            args.weight_dtype,
        )
        assert way.args.gradient_checkpointing == list(names) and way.peak <= SHARE * memory
        size = way.args.train_batch_size
        assert 16 // processes % size == 0
        if size < 16 // processes:
            assert stand_in_rehearsal(None, args, processes, memory, kind, names, 2 * size) > SHARE * memory


def test_what_is_given_wins(stand_in_rehearsal):
    args, lines = fit([tiny("--device_memory=10", "--sharding=full")], [], processes=2, device="cpu")
    assert (args.sharding, args.cpu_offload, args.train_batch_size) == ("full", False, 8)
    args, _ = fit([tiny("--device_memory=10", "--cpu_offload")], [], processes=1, device="cpu")
    assert (args.sharding, args.cpu_offload) == ("full", True)
    words = ["--device_memory", "10", "--prompt_file", "x y", "--hub_token", "secret", "--fit=auto"]
    given = ["--train_batch_size=2", "--gradient_checkpointing", "teacher"]
    args, lines = fit([tiny("--device_memory=10", *given)], words, processes=1, device="cpu")
    assert (args.train_batch_size, args.gradient_checkpointing) == (2, ["teacher"])
    assert re.fullmatch(
        r"fit: accelerate launch -q \S+ --prompt_file 'x y' --recipe=none --fit=none --sharding=none "
        r"--gradient_checkpointing teacher --train_batch_size=2",
        lines[1],
    )


def test_on_a_cpu_nothing_is_chosen_unless_asked():
    for more in ([], ["--fit=none", "--device_memory=1"]):
        args, lines = fit([tiny(*more)], [], processes=1, device="cpu")
        assert lines == [] and (args.sharding, args.cpu_offload, args.gradient_checkpointing) == ("none", False, False)
        assert (args.train_batch_size, args.gradient_accumulation_steps) == (2, 8)


def test_where_whole_networks_do_not_fit_loras_are_named_or_taken(stand_in_rehearsal):
    for memory, networks in ((20, ["lora_fake", "lora", "lora"]), (10, ["lora"]), (1, [])):
        limit = f"--device_memory={memory / 1e9}"
        with pytest.raises(UserError) as error:
            fit([tiny(limit)], ["--seed=1"], processes=1, device="cpu")
        commands = re.findall("accelerate launch -q .*", str(error.value))
        assert [re.search(r"--networks=(\w+)", command)[1] for command in commands] == networks
        assert all("--fit=none" in command and "--fake_score_learning_rate=0.0001" in command for command in commands)
        assert networks or "does not fit" in str(error.value)
        if networks:
            args, lines = fit([tiny(limit, "--fit=lora")], [], processes=1, device="cpu")
            assert args.networks == networks[0] and args.weight_dtype == "bfloat16"
            assert args.fake_score_learning_rate == 1e-4 and f"--networks {networks[0]}" in lines[0]


def test_the_layout_changes_no_parameter(tmp_path):
    """By the script: memory for everything, for checkpointed networks on one process, and for shards on two."""
    stage = stage_of(tiny())
    checkpointed = _measure(stage, tiny(), 1, 1e9, "none", CHECKPOINTING["generator, fake score"], 1)
    shards = _measure(stage, tiny(), 2, 1e9, "full", (), 1)
    layouts = {  # name -> bytes, and what they are enough for
        "whole": (1e10, ["none", False, 8]),
        "checkpointed": (checkpointed * 1.001 / SHARE, ["none", ["generator", "fake_score"], 1]),
        "shards": (shards * 1.001 / SHARE, ["full", False, 1]),
    }
    settings = {"train_batch_size": None, "gradient_accumulation_steps": None, "max_train_images": 16}
    for name, (memory, layout) in layouts.items():
        words = arguments(tmp_path / name, "--images_per_update=8", **settings, device_memory=memory / 1e9)
        if name == "shards":
            run_command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, *words)
        else:
            run_here(*words)
        noted = json.loads((tmp_path / name / "student/training_args.json").read_text())["training_args"]
        assert [noted[n] for n in ("sharding", "gradient_checkpointing", "train_batch_size")] == layout
        student = [load_file(tmp_path / one / STUDENT) for one in ("whole", name)]
        assert largest_difference(*student) < 1e-6


# --------------------------------------------------------------------------------------------- accelerate's own FSDP


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


@pytest.mark.parametrize(
    ("launched", "given", "expected"),
    [
        ({}, {}, ("full", False, False)),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, ("full", True, False)),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, ("full", False, [])),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {"sharding": "hybrid", "cpu_offload": True}, ("hybrid", True, False)),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {"networks": "lora"}, ("full", False, False)),
    ],
)
def test_an_fsdp_configuration_is_taken_at_its_word(launched, given, expected, monkeypatch):
    for name, value in (FSDP | launched).items():
        monkeypatch.setenv(name, value)
    names = ("sharding", "cpu_offload", "gradient_checkpointing")
    args = Namespace(**dict.fromkeys(names) | {"networks": "full"} | given)
    take_fsdp_config(args)
    assert tuple(getattr(args, name) for name in names) == expected
    assert not_honoured() == []


def test_what_an_fsdp_configuration_cannot_have_is_named(monkeypatch):
    for name, value in (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_STATE_DICT_TYPE": "FULL"}).items():
        monkeypatch.setenv(name, value)
    reshard, states = not_honoured()
    assert reshard.startswith("fsdp_reshard_after_forward: false of the Accelerate configuration is not taken: ")
    assert states.startswith("fsdp_state_dict_type: FULL of ")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="set fsdp_version: 2 in the Accelerate configuration"):
        take_fsdp_config(Namespace())


@pytest.mark.parametrize("precision", ["amp", "bf16"])
def test_two_processes_by_a_shipped_fsdp_configuration(precision, tmp_path):
    """The real launcher: the same bits as --sharding full."""
    more = ["--weight_dtype=bfloat16", "--seed=1"] if precision == "bf16" else ["--seed=1"]
    config = yaml.safe_load((CONFIGS / f"fsdp_{precision}.yaml").read_text()) | {"num_processes": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "-q")
    with_fsdp = (*launch, "--config_file", tmp_path / "config.yaml", "--main_process_port", 0, SCRIPT)
    run_command(*with_fsdp, *arguments(tmp_path / "fsdp", *more, train_batch_size=1))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT)
    more += ["--sharding=full", *(["--mixed_precision=bf16"] if precision == "amp" else [])]
    run_command(*torchrun, *arguments(tmp_path / "ours", *more, train_batch_size=1))
    assert (tmp_path / "fsdp" / STUDENT).read_bytes() == (tmp_path / "ours" / STUDENT).read_bytes()
    noted = json.loads((tmp_path / "fsdp/student/training_args.json").read_text())["training_args"]
    assert (noted["sharding"], noted["weight_dtype"]) == ("full", "bfloat16" if precision == "bf16" else "float32")


# ------------------------------------------------------------------------------------------ the command, from the Hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub():
    """The paper's prompts, beside images; a teacher is published by the test."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with LoopbackHub() as hub:
        files = {}
        for part in range(2):
            captions = [f"{'red green blue'.split()[i % 3]} square {part} {i}" for i in range(40)]
            file = io.BytesIO()
            table = pa.table({"llava": captions, "image": [bytes(1 << 10)] * 40})
            parquet.write_table(table, file, row_group_size=20, compression="none")
            files[f"train-{part:05}-of-00002.parquet"] = file.getvalue()
        hub.publish(DATASET, files)
        yield hub


def the_line(hub, home, *more, launch=("-m", "accelerate.commands.accelerate_cli", "launch", "-q")):
    words = [*launch, SCRIPT, "--pretrained_model_name_or_path", LARGE, *more]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=guarded(hub, home, token=None),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_the_command_alone_tells_what_it_would_do(hub, tmp_path):
    hub.publish(LARGE, files_of(published_teacher("sd3.5-large")))
    done = the_line(hub, tmp_path, "--dry_run", 8, "--device_memory", 80)
    printed = done.stdout.replace(str(SCRIPT), str(SCRIPT.relative_to(ROOT))).splitlines()
    shown = SCRIPT.with_name("README.md").read_text().split("```\nteacher: ")[1].split("\n```")[0].splitlines()
    assert ["teacher: " + shown[0], *shown[1:]] == printed
    assert printed[:2] == [f"teacher: {LARGE}", "recipe: sd3.5_large_amp"]
    assert printed[2].startswith("fit: float32 weights, in shards (full), ")
    assert f"prompts: 4,096 at a time, of {DATASET}, 22.38 GB of conditioning" in printed
    assert any(line.startswith("rehearsed, each process takes at its peak") for line in printed)
    assert any(line.startswith("images per update: 256 = 8 processes x ") for line in printed)
    assert printed[-1] == "time: 277.8 hours for the paper, which had 8 H100 GPUs of 80 GB"
    prompts, recipe = [line for line in done.stderr.splitlines() if line.startswith(("recipe: ", "prompts: "))]
    assert recipe.startswith(
        "recipe: sd3.5_large_amp or sd3.5_large_bf16, since stabilityai/stable-diffusion-3.5-large"
    )
    assert prompts == f"prompts: those of the paper, {DATASET}, 4096 at a time"


def test_the_command_alone_trains_on_one_process_and_on_two(hub, tmp_path):
    """Teacher and prompts from the Hub; a part of the prompts for each update, the second from both files."""
    hub.publish(LARGE, files_of(saved_teacher("stable_diffusion_3")))
    more = ["--prompts_per_part=32", "--images_per_update=32", "--max_train_images=96", "--learning_rate=1e-3"]
    more += ["--report_to=none", "--checkpointing_images=96", "--adam_epsilon=1e-2"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for processes, launch in ((1, {}), (2, {"launch": torchrun})):
        the_line(hub, tmp_path, *more, f"--output_dir={tmp_path / str(processes)}", **launch)
    assert largest_difference(*(load_file(tmp_path / name / STUDENT) for name in "12")) < 1e-6
    kept = list((tmp_path / "1" / "prompts").glob("part-*"))
    assert [path.name for path in kept] == ["part-0000000002"]
    prompts = json.loads((kept[0] / "prompts.json").read_text())["prompts"]
    assert prompts[:2] == ["red square 1 24", "green square 1 25"] and prompts[16] == "red square 0 0"  # once around


def test_without_the_hub_the_sentence_names_prompt_file(tmp_path):
    done = run_command(
        SCRIPT,
        f"--pretrained_model_name_or_path={saved_teacher('stable_diffusion_3')}",
        "--report_to=none",
        check=False,
    )
    assert done.returncode == 2
    assert re.search(rf"error: the dataset {DATASET} of the prompts cannot be reached \(.*\): give your own, by "
                     r"--prompt_file FILE.txt with one prompt per line.$", done.stderr.strip())  # fmt: skip


def test_a_teacher_that_ships_prompts_is_trained_on_them(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    for name, content in files_of(saved_teacher("stable_diffusion_3")).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "prompts.txt").write_text("red square\n")
    (args,) = parse([f"--pretrained_model_name_or_path={folder}", "--report_to=none"])
    assert args.prompt_file == str(folder / "prompts.txt") and args.dataset_name is None


def test_the_readme_begins_with_the_line():
    commands = re.findall(r"accelerate launch[^`]*?train_sid_dit.py[^`]*", (ROOT / "README.md").read_text())
    words = commands[0].replace("\\\n", " ").split()
    assert words[-2:] == ["--pretrained_model_name_or_path", LARGE] and words[-3].endswith("train_sid_dit.py")
