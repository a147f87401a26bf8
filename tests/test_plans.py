# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Plans are put together from what is rehearsed once, to the byte what each way of training tells by itself."""

import functools
import itertools
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from training_helpers import saved_teacher

from hf_flowdistill.methods.sid import SiDConfig
from hf_flowdistill.networks.roles import FULL, ROLES, RoleSettings
from hf_flowdistill.planning import cases, choices, ghosts, kept
from hf_flowdistill.planning.cases import SHARDING_PLANS, Case, Precision, Stage
from hf_flowdistill.planning.choices import AMP, BF16, NEAREST, format_choices, format_lines, list_choices
from hf_flowdistill.planning.few_blocks import rehearse_blocks
from hf_flowdistill.planning.rehearsal import stand_in_contract
from hf_flowdistill.planning.skeleton import load_skeleton, measure_shapes
from hf_flowdistill.planning.startup import Start
from hf_flowdistill.planning.traces import NotAlike


SIZE = {"height": 32, "width": 32}
VIEWS = [cases._shares(8, plan, where) for plan in SHARDING_PLANS.values() for where in ("accelerator", "main memory")]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "folder", lambda: tmp_path / "plans")


def longer(name: str, config=None, **layers) -> Stage:
    """Of a tiny teacher with so many layers."""
    shapes = measure_shapes(load_skeleton(saved_teacher(name)), **SIZE)
    transformer = load_skeleton(saved_teacher(name)).transformer
    with torch.device("meta"):
        transformer = type(transformer).from_config(dict(transformer.config) | layers).eval()
    return Stage(transformer, stand_in_contract(shapes, **SIZE), config or SiDConfig(), Start(0, 0, 0, 0))


def by_itself(case: Case, stage: Stage):
    """The peaks of a case from rehearsals of its own."""
    return rehearse_blocks(stage.transformer, functools.partial(case._rehearse, stage, VIEWS))


@functools.cache
def stages(name: str) -> Stage:
    """One for all cases, since what they share is the point."""
    embedded = SiDConfig(guidance_mode="both", fake_guidance_mode="embedded")
    return {
        "SD3": lambda: longer("stable_diffusion_3", num_layers=4),
        "FLUX": lambda: longer("flux", embedded, num_layers=4, num_single_layers=3),
    }[name]()


WAYS = {
    "full, AMP": ("SD3", FULL, AMP),
    "full, BF16": ("FLUX", FULL, BF16),
    "full, nearest": ("SD3", FULL, NEAREST),
    "lora_fake": ("FLUX", RoleSettings("lora_fake", 4), AMP),
    "lora": ("SD3", RoleSettings("lora", 4), BF16),
    "lora, 8bit": ("FLUX", RoleSettings("lora", 4, base_quantization="8bit"), BF16),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_shared_is_what_each_way_of_training_takes(way):
    """To the byte: every component at the peak, with all networks checkpointed, two or none, in shards or not."""
    teacher, roles, precision = WAYS[way]
    stage = stages(teacher)
    for checkpointed, cached in itertools.product((ROLES, ROLES[1:], ()), (True, False)[: 1 + precision.autocast]):
        case = Case(roles, precision, checkpointed, 2, cached, share_rollout=way == "lora")
        assert stage.rehearsals.peaks(case, VIEWS) == by_itself(case, stage)


def test_the_8_bit_adam_is_shared_too():
    stage = stages("SD3")
    case = Case(FULL, Precision(torch.bfloat16), (), 1, use_8bit_adam=True)
    assert stage.rehearsals.peaks(case, VIEWS) == by_itself(case, stage)


class Keeps(torch.nn.Module):
    """Around a block: it keeps what it last returned."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        self.last = self.block(*args, **kwargs)
        return self.last


def test_a_network_that_keeps_what_it_makes_is_rehearsed_as_a_whole():
    """Its calls do not come apart; what it keeps counts all the same."""
    plain, stage = longer("flux", num_layers=1, num_single_layers=1), longer("flux", num_layers=1, num_single_layers=1)
    stage.transformer.x_embedder = Keeps(stage.transformer.x_embedder)
    case = Case(FULL, Precision(torch.float32), (), 2)
    with pytest.raises(NotAlike, match="outlives its call"):
        stage.rehearsals.peaks(case, VIEWS)
    ((peak, *_),), ((without, *_),) = (case.memory(one, 1, ["none"]) for one in (stage, plain))
    assert peak == by_itself(case, stage)[0]
    assert peak.components["activations"] >= without.components["activations"]


OPERATIONS = {
    "a view": lambda x, y: (x.view(6, 4), x.transpose(0, 1)[1:], x.expand(3, *x.shape)),
    "new": lambda x, y: (x @ y.T, x.sum(0), x.bfloat16(), torch.nn.functional.gelu(x)),
    "in place": lambda x, y: (x.add_(y), x.mul_(2)),
    "several outputs": lambda x, y: (*torch.native_layer_norm(x, (6,), None, None, 1e-5), *x.split(2)),
    "made a view": lambda x, y: (x.unsqueeze_(0), x.squeeze_(0)),
    "beside real tensors": lambda x, y: (x + torch.ones(6), x * 2.0, torch.cat([x, torch.zeros(1, 6)])),
    "a list": lambda x, y: (*torch._foreach_add([x, y], 1.0), *torch._foreach_sqrt([x, y])),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_ghosts_are_like_fake_tensors(name):
    """Shapes, strides, dtypes and what shares memory with what; the first time and when it is known."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [torch.empty(4, 6), torch.empty(4, 6)]
    fakes += OPERATIONS[name](*fakes)
    for _ in range(2):
        made = [ghosts.empty((4, 6)), ghosts.empty((4, 6))]
        made += OPERATIONS[name](*made)
        assert [ghosts.form_of(tensor) for tensor in made] == [ghosts.form_of(tensor) for tensor in fakes]
        assert [tensor.form for tensor in made] == [ghosts.form_of(tensor) for tensor in fakes]
        places = [[id(ghosts.memory_of(tensor)) for tensor in tensors] for tensors in (made, fakes)]
        alike = [[ids.index(one) for one in ids] for ids in places]
        assert alike[0] == alike[1]
        assert [home.nbytes() for home in map(ghosts.memory_of, made)] == [f.untyped_storage().nbytes() for f in fakes]


def test_what_needs_values_says_so():
    with pytest.raises(Exception, match="_local_scalar_dense"):
        ghosts.empty((1,)).item()
    with ghosts.RememberedOnMeta(), pytest.raises(RuntimeError, match="meta tensor"):
        torch.ones(1, device="meta").item()


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"beside real tensors"}))
def test_what_is_remembered_on_the_meta_device_is_what_it_tells(name):
    """Shapes, strides and dtypes; a network's call asks for no more there."""

    def forms():
        made = [torch.empty(4, 6, device="meta"), torch.empty(4, 6, device="meta")]
        made += OPERATIONS[name](*made)
        return [(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device) for tensor in made]

    told = forms()
    with ghosts.RememberedOnMeta():
        assert forms() == forms() == told


def plan(memory=1e12, teacher="stable_diffusion_3", **settings):
    settings = {"networks": ["full"], "checkpointing": ["all"], **settings}
    return list(list_choices(saved_teacher(teacher), gpus=2, memory=memory, **SIZE, **settings))


def test_what_was_rehearsed_is_kept(monkeypatch):
    """For any memory; rows that were not asked for are rehearsed, and kept beside the others."""
    first = plan()
    (file,) = kept.folder().iterdir()
    rows = json.loads(file.read_text())
    assert rows and all(choice.fits for choice in first)

    def rehearsed(*args, **settings):
        raise AssertionError("once more")

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "of", rehearsed)
        assert plan() == first
        assert [choice.in_memory(1e3) for choice in first] == plan(1e3)
        assert not any(choice.fits for choice in plan(1e3))
        for other in ({"rank": 8}, {"batch_sizes": [2]}, {"networks": ["lora"]}, {"teacher": "flux"}):
            with pytest.raises(AssertionError, match="once more"):
                plan(**other)
        patch.setattr(kept, "_version", lambda name: "another")
        with pytest.raises(AssertionError, match="once more"):
            plan()
        with pytest.raises(AssertionError, match="once more"):
            plan(keep=False)
    both = plan(batch_sizes=[1, 2])
    assert [choice for choice in both if choice.batch_size == 1] == first
    assert len(json.loads(file.read_text())) == 2 * len(rows)
    assert [one.name for one in kept.folder().iterdir()] == [file.name]


def test_a_damaged_file_is_made_anew():
    first = plan()
    (file,) = kept.folder().iterdir()
    whole = file.read_text()
    for content in ("{", '{"row": [{"peak": 1}]}', "null"):
        file.write_text(content)
        assert plan() == first
        assert file.read_text() == whole


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setattr(kept, "folder", lambda: tmp_path / "a file" / "plans")
    assert plan() == plan()


def test_a_plan_that_is_broken_off_has_its_rows():
    rows = list_choices(saved_teacher("sana"), gpus=1, memory=1e12, **SIZE, pipeline_kwargs=SANA)
    first = next(rows)
    rows.close()
    (file,) = kept.folder().iterdir()
    assert len(json.loads(file.read_text())) == 1 and first.networks == "full"


SANA = {"complex_human_instruction": None, "use_resolution_binning": False}


def test_another_configuration_has_another_key(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    key = kept.teacher_key(folder)
    (folder / "model.safetensors").write_bytes(b"others")
    assert kept.teacher_key(folder) == key
    (folder / "config.json").write_text('{"layers": 2}')
    assert kept.teacher_key(folder) not in (key, None)
    assert kept.teacher_key("nobody/nothing-that-was-downloaded") is None


def test_rows_come_one_by_one_in_columns_that_stay():
    found = plan()
    asked = []
    lines = format_lines(asked.append(choice) or choice for choice in found)
    head = [next(lines), next(lines)]
    assert len(asked) == 1
    rows = list(lines)
    assert len(rows) == len(found) and len({len(line) for line in [*head, *rows]}) == 1

    def words(lines):
        return [line.split() for line in lines if "---" not in line]

    assert words([*head, *rows]) == words(format_choices(found).splitlines())


def test_commands_have_a_learning_rate_for_adapters():
    settings = {"networks": ["full", "lora_fake", "lora"], "checkpointing": ["none"]}
    commands = {choice.networks: choice.command for choice in plan(**settings)}
    assert "learning_rate" not in commands["full"]
    assert " --fake_score_learning_rate 0.0001 " in commands["lora_fake"] + " "
    assert " --learning_rate 0.0001 " in commands["lora"] + " "
    assert choices.RATE == 1e-4
