# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import json
import shutil

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from training_helpers import PIPELINE_KWARGS, quiet, saved_teacher

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.loading import load_pipeline, weights_digest
from hf_flowdistill.networks.placement import modules_of, move_all_but_transformer, streamed
from hf_flowdistill.networks.roles import Networks
from hf_flowdistill.planning.skeleton import load_skeleton
from hf_flowdistill.teachers import decode, encode_prompts, learn_contract


@pytest.fixture
def networks():
    return Networks.from_teacher(tiny_pipelines.stable_diffusion_3().transformer)


def test_loading_is_diffusers_own():
    with quiet():
        pipeline = load_pipeline(saved_teacher("stable_diffusion_3"))
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    expected = tiny_pipelines.stable_diffusion_3().transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.transformer.state_dict().items())


def test_absent_components_stay_absent(tmp_path):
    """diffusers wants to be told again about SD3's text encoder that is not there."""
    with quiet():
        tiny_pipelines.stable_diffusion_3(with_t5=False).save_pretrained(tmp_path)
        pipeline = load_pipeline(tmp_path)
    assert pipeline.text_encoder_3 is None and pipeline.tokenizer_3 is None and pipeline.text_encoder is not None


def spoiled(folder, component, change=lambda weights: None, **config):
    """A copy of the tiny SD3 with `change` made to one component's weights, and `config` to its configuration."""
    shutil.copytree(saved_teacher("stable_diffusion_3"), folder)
    (file,) = (folder / component).glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    settings = json.loads((folder / component / "config.json").read_text())
    (folder / component / "config.json").write_text(json.dumps(settings | config))
    return folder


def shorter(name):
    return lambda weights: weights.update({name: weights[name][..., :-1].contiguous()})


@pytest.mark.parametrize(
    ("component", "weight"),
    [
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight"),
        ("text_encoder_3", "shared.weight"),
        ("transformer", "proj_out.weight"),
        ("vae", "decoder.conv_in.weight"),
    ],
)
def test_a_weight_that_is_missing_is_named_and_not_made_up(component, weight, tmp_path):
    with pytest.raises(UserError) as error, quiet():
        load_pipeline(spoiled(tmp_path / "less", component, lambda weights: weights.pop(weight)))
    named = "encoder.embed_tokens.weight" if weight == "shared.weight" else weight  # T5's two names of it
    assert f"the component {component} of " in str(error.value) and f", {named} for one" in str(error.value)
    wrong = spoiled(tmp_path / "other", component, shorter(weight))
    with pytest.raises(UserError, match=f"the component {component} of .*{weight.split('.')[-1]}") as error, quiet():
        load_pipeline(wrong)
    assert "\n" not in str(error.value) and "shape" in str(error.value)


def test_a_weight_that_is_not_used_is_told(tmp_path, caplog):
    more = spoiled(tmp_path / "more", "transformer", lambda weights: weights.update(strange=torch.zeros(3)))
    with quiet():
        load_pipeline(more)
    (line,) = [record.message for record in caplog.records if record.name.startswith("hf_flowdistill")]
    assert (
        "the component transformer of " in line and "has 1 weight that its SD3Transformer2DModel does not use" in line
    )


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
@pytest.mark.parametrize("load", [load_pipeline, load_skeleton])
def test_what_is_quantized_already_is_refused(component, load, tmp_path):
    path = spoiled(tmp_path / "small", component, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(
        UserError, match=f"the component {component} of .* is quantized already: give the model it was"
    ):
        load(path)


def test_a_file_that_ends_early(tmp_path):
    path = spoiled(tmp_path / "half", "text_encoder")
    (file,) = (path / "text_encoder").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="the component text_encoder of .* does not load: "), quiet():
        load_pipeline(path)


def test_the_hub_is_asked_for_ids_only(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network\nand more lines")

    monkeypatch.setattr(DiffusionPipeline, "load_config", no_network)
    with pytest.raises(
        UserError, match="someone/something is no folder, and as a Hub id it cannot be read: no network$"
    ):
        load_pipeline("someone/something")
    for path in ("nowhere", "./nowhere", "/no/where/at/all", "~/nowhere"):
        with pytest.raises(UserError, match="does not exist: give a diffusers pipeline folder or a Hub id"):
            load_pipeline(path)


def test_three_networks_with_one_start(networks):
    states = [network.state_dict() for network in (networks.teacher, networks.generator, networks.fake_score)]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])
    pointers = {
        p.data_ptr() for n in (networks.teacher, networks.generator, networks.fake_score) for p in n.parameters()
    }
    assert len(pointers) == 3 * len(list(networks.teacher.parameters()))
    assert not any(p.requires_grad for p in networks.teacher.parameters())
    assert all(p.requires_grad for network in networks.trained().values() for p in network.parameters())
    assert not any(m.training for n in (networks.teacher, *networks.trained().values()) for m in n.modules())


def test_half_precision_weights_are_trained_in_float32():
    networks = Networks.from_teacher(tiny_pipelines.stable_diffusion_3(dtype=torch.bfloat16).transformer)
    for network in (networks.teacher, networks.generator, networks.fake_score):
        assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "other"), [("generator", "fake_score"), ("fake_score", "generator")])
def test_one_network_trains_at_a_time(networks, name, other):
    def trainable(role):
        return {p.requires_grad for p in getattr(networks, role).parameters()}

    with pytest.raises(RuntimeError, match="in the middle"), networks.training(name) as network:
        assert network is getattr(networks, name)
        assert (trainable(name), trainable(other), trainable("teacher")) == ({True}, {False}, {False})
        raise RuntimeError("in the middle")
    assert (trainable(name), trainable(other), trainable("teacher")) == ({True}, {True}, {False})


def test_gradient_checkpointing_of_some(networks):
    networks.enable_gradient_checkpointing(["generator", "fake_score"])
    flags = (networks.teacher, networks.generator, networks.fake_score)
    assert [network.is_gradient_checkpointing for network in flags] == [False, True, True]


def test_gradient_checkpointing_reaches_all_three(networks):
    networks.enable_gradient_checkpointing()
    for network in (networks.teacher, networks.generator, networks.fake_score):
        assert network.is_gradient_checkpointing


def test_moving_leaves_the_transformer():
    pipeline = tiny_pipelines.stable_diffusion_3()
    move_all_but_transformer(pipeline, "meta")
    assert pipeline.transformer.device.type == "cpu"
    assert {pipeline.vae.device.type, pipeline.text_encoder.device.type} == {"meta"}


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", "sana"])
def test_weights_that_are_streamed_change_nothing(name, monkeypatch):
    """What is learned, encoded and decoded with weights that come layer by layer, and the pipeline afterwards."""
    pipeline = load_pipeline(saved_teacher(name))
    before = {part: weights_digest(module) for part, module in modules_of(pipeline).items()}
    settings = {"height": 32, "width": 32, "pipeline_kwargs": PIPELINE_KWARGS.get(name)}

    def run():
        contract = learn_contract(pipeline, **settings)
        latents = torch.ones(1, *contract.latent_shape)
        return contract, encode_prompts(pipeline, contract, ["red circle"]), decode(pipeline, contract, latents, "pt")

    expected = run()
    monkeypatch.setattr("hf_flowdistill.networks.placement.waits", lambda module, device: True)
    with streamed(modules_of(pipeline).values(), "cpu"):
        assert {p.device.type for module in modules_of(pipeline).values() for p in module.parameters()} == {"meta"}
        contract, conditioning, image = run()
    assert contract.as_dict() == expected[0].as_dict()
    for found, wanted in zip(conditioning, expected[1]):
        assert all(torch.equal(found.tensors[key], wanted.tensors[key]) for key in wanted.tensors)
    assert torch.equal(image, expected[2])
    assert {part: weights_digest(module) for part, module in modules_of(pipeline).items()} == before
