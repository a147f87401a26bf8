# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is planned without weights is what there is with them; the published teachers have their published sizes."""

import dataclasses
import json
import shutil
from collections import Counter

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from published_teachers import published_teacher
from training_helpers import PIPELINE_KWARGS, folder, saved_teacher

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.adapters import Role
from hf_flowdistill.networks.blocks import linear_layers, sharding_units
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.networks.roles import FULL, Networks, RoleSettings
from hf_flowdistill.planning.describe import describe_memory, describe_shapes
from hf_flowdistill.planning.sizes import count, training_memory
from hf_flowdistill.planning.skeleton import load_skeleton, measure_shapes
from hf_flowdistill.teachers import encode_prompts, learn_contract
from hf_flowdistill.teachers.conditioning import EMBEDDED_GUIDANCE
from hf_flowdistill.training.ema import EMA
from hf_flowdistill.training.optimizers import build_optimizer


# The published size, and the blocks. Of SD3.5-Medium ("2.5B") and FLUX.1-dev ("12B") that is the number of values in
# the transformer's safetensors files, of the others what the card or the paper of SANA says.
PUBLISHED = {
    "sd3.5-large": (8.1e9, {"JointTransformerBlock": 38}),
    "sd3.5-medium": (2_469_663_936, {"JointTransformerBlock": 24}),
    "flux.1-dev": (11_901_408_320, {"FluxTransformerBlock": 19, "FluxSingleTransformerBlock": 38}),
    "sana-0.6b-512": (590e6, {"SanaTransformerBlock": 28}),
    "sana-1.6b-512": (1604e6, {"SanaTransformerBlock": 20}),
    "sana-sprint-0.6b-1024-teacher": (590e6, {"SanaTransformerBlock": 28}),
    "sana-sprint-1.6b-1024-teacher": (1604e6, {"SanaTransformerBlock": 20}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_teachers_have_their_published_size(name):
    """To 1 %, or exactly where every value is counted. The files of SD3 hold its table of positions, which is not
    trained: 226M of SD3.5-Medium's 2.5B."""
    published, blocks = PUBLISHED[name]
    transformer = load_skeleton(published_teacher(name)).transformer
    assert {parameter.device.type for parameter in transformer.parameters()} == {"meta"}
    values = sum(count(transformer))
    assert values == published if isinstance(published, int) else abs(values / published - 1) < 0.01
    units = sharding_units(transformer)
    assert Counter(type(unit).__name__ for unit in units) == blocks
    assert sum(count(unit)[0] for unit in units) > 0.97 * count(transformer)[0]


@pytest.mark.parametrize(
    ("name", "size", "image", "text", "latent"),
    [
        ("sd3.5-large", 1024, 4096, 77 + 256, (16, 128, 128)),
        ("flux.1-dev", 512, 1024, 512, (1024, 64)),
        ("sana-1.6b-512", 512, 256, 300, (32, 16, 16)),
        ("sana-sprint-0.6b-1024-teacher", 1024, 1024, 300, (32, 32, 32)),
        ("sana-sprint-1.6b-1024-teacher", 1024, 1024, 300, (32, 32, 32)),
    ],
)
def test_tokens_of_published_teachers(name, size, image, text, latent):
    shapes = measure_shapes(load_skeleton(published_teacher(name)), height=size, width=size)
    assert shapes.latent == ("hidden_states", latent)
    assert (shapes.image_tokens, shapes.text_tokens) == (image, text)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "sana", "flux"])
def test_shapes_without_weights_are_those_with_them(name):
    """Against the contract, which runs the real networks; the folder that is planned has no weights at all."""
    path = folder() / f"{name}-without-weights"
    shutil.copytree(saved_teacher(name), path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    settings = {"height": 64, "width": 32, "pipeline_kwargs": PIPELINE_KWARGS.get(name)}
    shapes = measure_shapes(load_skeleton(path), **settings)
    pipeline = load_pipeline(saved_teacher(name))
    contract = learn_contract(pipeline, **settings)
    assert shapes.latent == (contract.latent_argument, contract.latent_input_shape)
    rows, _ = encode_prompts(pipeline, contract, ["red circle"])
    kept = {key: row[0] for key, row in rows.tensors.items() if key != EMBEDDED_GUIDANCE}
    assert shapes.conditioning == {
        key: (tuple(row.shape), row.numel() * row.element_size()) for key, row in kept.items()
    }


@pytest.mark.parametrize(
    ("component", "library", "name", "made"),
    [
        ("text_encoder_3", "transformers", "AutoModel", "T5Model"),
        ("text_encoder_3", "transformers", "AutoModelForTextEncoding", "T5EncoderModel"),
        ("transformer", "diffusers", "AutoModel", "SD3Transformer2DModel"),
    ],
)
def test_a_plan_reads_no_weights_of_a_component_that_names_an_auto_class(component, library, name, made):
    """Such a class is no model itself; the folder's weights are files that cannot be read."""
    sd3, path = saved_teacher("stable_diffusion_3"), folder() / f"{component}-as-{library}-{name}"
    shutil.copytree(sd3, path)
    for file in path.rglob("*.safetensors"):
        file.write_bytes(b"no weights")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {component: [library, name]}))
    skeleton = load_skeleton(path)
    assert type(getattr(skeleton, component)).__name__ == made
    networks = [module for module in skeleton.components.values() if isinstance(module, torch.nn.Module)]
    assert len(networks) == 5 and not any(network.training for network in networks)
    for network in networks:
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    if made != "T5Model":  # which has a decoder, and so is no text encoder of this pipeline
        expected = measure_shapes(load_skeleton(sd3), height=32, width=32)
        assert measure_shapes(skeleton, height=32, width=32) == expected


KEPT = {
    "full": {},
    "full, bfloat16": {"dtype": torch.bfloat16},
    "full, bfloat16, nearest": {"dtype": torch.bfloat16, "bf16_rounding": "nearest"},
    "full, 8-bit Adam": {"use_8bit_adam": True},
    "lora_fake, bfloat16": {"dtype": torch.bfloat16, "roles": RoleSettings("lora_fake", rank=4)},
    "lora": {"roles": RoleSettings("lora", rank=64, lora_layers="to_q,ff.net.2"), "use_8bit_adam": True},
    "lora, 8bit": {"roles": RoleSettings("lora", rank=4, base_quantization="8bit")},
    "lora, nf4": {"roles": RoleSettings("lora", rank=4, base_quantization="nf4"), "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", KEPT)
def test_memory_is_what_a_run_keeps(case):
    """Every tensor of networks, optimizers and average after an update of both networks, counted."""
    if "8bit" in case or "8-bit" in case or "nf4" in case or case == "lora":
        pytest.importorskip("bitsandbytes")
    roles, dtype = KEPT[case].get("roles", FULL), KEPT[case].get("dtype", torch.float32)
    settings = {name: value for name, value in KEPT[case].items() if name not in ("roles", "dtype")}
    teacher = load_teacher()
    planned = {what: size for what, _, size in training_memory(teacher, dtype, roles, **settings)}
    networks = Networks.from_teacher(teacher, dtype, roles)
    average = EMA(networks.generator)

    def size_of(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    base = {name: tensor for name, tensor in teacher.state_dict().items() if ".lora_" not in name}
    scales = [weight.SCB for weight in teacher.parameters() if getattr(weight, "SCB", None) is not None]
    kept = {"teacher": size_of([*base.values(), *scales]), "gradients of one network": 0}
    kept["average of the generator"] = size_of(average.model.state_dict().values())
    for name, network in networks.trained().items():
        role = name.replace("_", " ")
        is_adapter = isinstance(network, Role)
        kept[f"adapter of the {role}" if is_adapter else role] = size_of(network.state_dict().values())
        rounding = {"rounding": settings.get("bf16_rounding", "stochastic")}
        optimizer = build_optimizer(network, use_8bit_adam=settings.get("use_8bit_adam", False), **rounding)
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        gradients = size_of(parameter.grad for parameter in network.parameters())
        kept["gradients of one network"] = max(kept["gradients of one network"], gradients)
        optimizer.step()
        moments = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
        states = [state[key] for state in optimizer.state.values() for key in moments if key in state]
        kept[f"Adam's moments of the {role}"] = size_of(states)
    if roles.base_quantization != "none":  # the tables of quantization, a few hundred bytes each, are not planned
        assert 0 <= kept.pop("teacher") - planned.pop("teacher") < 600 * len(linear_layers(load_teacher()))
    assert kept == planned


def load_teacher():
    return load_pipeline(saved_teacher("stable_diffusion_3")).transformer


def test_blocks_where_diffusers_names_none():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    network = torch.nn.ModuleDict({"body": torch.nn.ModuleList([Block(), Block()]), "head": torch.nn.Linear(2, 2)})
    assert sharding_units(network) == list(network["body"])
    network._no_split_modules = ["Linear"]
    assert sharding_units(network) == [block.inner[0] for block in network["body"]]


def refusal(path, size=(32, 32), **pipeline_kwargs):
    with pytest.raises(UserError) as error:
        measure_shapes(load_skeleton(path), height=size[0], width=size[1], pipeline_kwargs=pipeline_kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_planned_is_refused():
    sd3, flux = saved_teacher("stable_diffusion_3"), saved_teacher("flux")
    assert "pipeline_kwargs has 'colour', which is no argument" in refusal(sd3, colour=1)
    assert "have to be divisible by 8 but are 36 and 32" in refusal(sd3, (36, 32))
    assert "makes height 32, width 32 when asked for height 32, width 36" in refusal(flux, (32, 36))
    assert "height 512, width 512" in refusal(sd3, (512, 512))
    assert "is not a flow-matching pipeline" in refusal(saved_teacher("pixart"))
    assert "has a UNet instead of a flow-matching transformer" in refusal(saved_teacher("stable_diffusion"))

    mixed = folder() / "another-text-encoder"
    shutil.copytree(sd3, mixed)
    config = mixed / "text_encoder_3" / "config.json"
    config.write_text(config.read_text().replace('"d_model": 32', '"d_model": 64'))
    assert "fails when called with height 32, width 32: " in refusal(mixed)

    broken = folder() / "without-a-config"
    shutil.copytree(sd3, broken)
    (broken / "transformer" / "config.json").unlink()
    assert "the component transformer of" in refusal(broken)
    (broken / "transformer" / "config.json").write_text('{"num_layers": "many"}')
    assert "a SD3Transformer2DModel, has no configuration that fits it" in refusal(broken)
    index = broken / "model_index.json"
    whole = index.read_text()
    index.write_text(whole.replace('"transformers"', '"abacus"'))
    assert "has no configuration that fits it: module diffusers.pipelines has no attribute abacus" in refusal(broken)
    index.write_text(whole.replace("StableDiffusion3Pipeline", "TomorrowsPipeline"))
    assert "TomorrowsPipeline, which the installed diffusers does not have" in refusal(broken)


def test_networks_that_need_values():
    """In a text encoder they end it; in the transformer, what that is given is known all the same."""

    def look(module, args, output):
        return output[0].sum().item()

    skeleton = load_skeleton(saved_teacher("stable_diffusion_3"))
    skeleton.text_encoder_3.encoder.register_forward_hook(look)
    with pytest.raises(NotImplementedError, match="meta"):
        measure_shapes(skeleton, height=32, width=32)
    whole = measure_shapes(load_skeleton(saved_teacher("stable_diffusion_3")), height=32, width=32)
    skeleton = load_skeleton(saved_teacher("stable_diffusion_3"))
    skeleton.transformer.transformer_blocks[0].register_forward_hook(look)
    assert measure_shapes(skeleton, height=32, width=32) == dataclasses.replace(whole, image_tokens=None)


def test_embeddings_that_grow_with_the_prompt(monkeypatch):
    """A pipeline of the same class that does not pad says so."""
    encode_prompt = StableDiffusion3Pipeline.encode_prompt

    def encode_unpadded(self, prompt, *args, **kwargs):
        length = max(map(len, prompt))
        embeds = encode_prompt(self, prompt, *args, **kwargs)
        return embeds[0][:, :length], embeds[1][:, :length], *embeds[2:]

    path, size = saved_teacher("stable_diffusion_3"), {"height": 32, "width": 32}
    assert not measure_shapes(load_skeleton(path), **size).longer_with_prompt
    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", encode_unpadded)
    shapes = measure_shapes(load_skeleton(path), **size)
    assert shapes.longer_with_prompt and shapes.text_tokens == len("a cat")
    assert describe_shapes(shapes, **size)[1] == "text: 5 tokens, more for longer prompts"


def test_memory_of_shards_and_of_what_waits():
    """An eighth of all parameters, besides what is gathered; offloaded, the teacher alone stays. Buffers, a table of
    positions, are whole everywhere, and stay."""
    transformer = load_skeleton(published_teacher("sd3.5-large")).transformer

    def table(*lines):
        rows = [line.rsplit(maxsplit=3) for line in lines if line.startswith("  ") and line.endswith(" GB")]
        return {
            " ".join(row[:-3]).strip() if row[-3] in ("bfloat16", "float32") else row[0]: float(row[-2])
            for row in rows
        }

    whole, eighth = (table(*describe_memory(transformer, torch.bfloat16, shards=shards)) for shards in (1, 8))
    block = count(sharding_units(transformer)[0])[0]
    assert eighth.pop("gathered for a moment, at most") >= 2 * block * 2 / 1e9
    assert eighth.keys() == whole.keys()
    others, networks = count(transformer)[1], ("teacher", "generator", "fake score")
    held = {name: others * 2 / 1e9 for name in networks} | {"average of the generator": others * 4 / 1e9}
    for name in whole.keys() - {"together"}:
        assert abs(eighth[name] - held.get(name, 0) - (whole[name] - held.get(name, 0)) / 8) < 0.011
    lines = describe_memory(transformer, torch.bfloat16, shards=8, cpu_offload=True)
    assert lines[0] == "memory of each process that holds 1/8 of each network, before activations:"
    split = lines.index("in main memory, of each process:")
    stays = table(*lines[:split])
    assert list(stays) == ["teacher", "buffers", "gathered for a moment, at most", "together"]
    assert abs(stays["buffers"] - others * 8 / 1e9) < 0.011
    assert list(table(*lines[split:])) == [name for name in whole if name != "teacher"]


def test_memory_of_shards_beside_adapters():
    """Adapters and what belongs to them are whole on every process, and in its accelerator's memory."""
    transformer, roles = load_skeleton(published_teacher("sd3.5-large")).transformer, RoleSettings("lora_fake")
    whole, eighth = (
        {what: size for what, _, size in training_memory(transformer, torch.bfloat16, roles, shards)}
        for shards in (1, 8)
    )
    stays = ["adapter of the fake score", "Adam's moments of the fake score"]
    others = count(transformer)[1]
    held = {"teacher": others * 2, "generator": others * 2, "average of the generator": others * 4}
    for name in whole:
        shards = 1 if name in stays else 8
        assert eighth[name] == pytest.approx((whole[name] - held.get(name, 0)) / shards + held.get(name, 0))
    lines = describe_memory(transformer, torch.bfloat16, roles, shards=8, cpu_offload=True)
    waiting = lines[lines.index("in main memory, of each process:") + 1 : -1]
    assert len(waiting) == len(whole) - len(stays) - 1 and not any("fake score" in line for line in waiting)
