# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One thing at a time is changed that kept rows depend on, and the cache is refused with that thing's name."""

import copy
import csv
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from image_sets import picture
from teacher_cases import TEACHERS, learned
from training_helpers import quiet

from hf_flowdistill.data import keys
from hf_flowdistill.data.cache import cached_conditioning
from hf_flowdistill.data.image_dataset import open_dataset
from hf_flowdistill.data.images import ImagePairs
from hf_flowdistill.data.keys import encoder_key
from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.teachers import Conditioning, learn_contract
from hf_flowdistill.teachers.encode import learn_image_encoder


class WithTemplate(StableDiffusion3Pipeline):
    """The same networks, prompts in a template."""

    def encode_prompt(self, prompt, *args, **kwargs):
        return super().encode_prompt([f"art {text}" for text in prompt], *args, **kwargs)


@dataclass
class At:
    """A pipeline and its contract, to be changed."""

    pipeline: object
    contract: object
    patch: pytest.MonkeyPatch

    def argue(self, **changes):
        self.contract = replace(self.contract, **changes)

    def weigh(self, name):
        with torch.no_grad():
            next(getattr(self.pipeline, name).parameters()).view(-1)[0] += 1e-3

    def attend(self, name):
        getattr(self.pipeline, name).config._attn_implementation = "eager"

    def embed(self, name, **changes):
        getattr(self.pipeline, name).config.update(changes)

    def resize(self):
        self.contract = learn_contract(
            self.pipeline, height=64, width=64, pipeline_kwargs=self.contract.pipeline_kwargs
        )

    def templated(self):
        self.pipeline.__class__ = WithTemplate


def set_on(component: str | None, **values) -> Callable[[At], None]:
    def change(at):
        for name, value in values.items():
            setattr(getattr(at.pipeline, component) if component else at.pipeline, name, value)

    return change


def library(name: str) -> Callable[[At], None]:
    """Another minor version of it."""
    real = keys.version

    def change(at):
        at.patch.setattr(keys, "version", lambda library: "0.1.2" if library == name else real(library))

    return change


ENCODER = {  # what is changed: teacher, how, the names in the sentence
    "the pad token": ("sd3", set_on("tokenizer_2", pad_token="a"), "tokenizer_2, fed"),
    "the pad token of T5": ("sd3", set_on("tokenizer_3", pad_token="a"), "tokenizer_3, fed"),
    "the padding side": ("sd3", set_on("tokenizer_3", padding_side="left"), "tokenizer_3, fed"),
    "the side that is cut": ("sd3", set_on("tokenizer", truncation_side="left"), "tokenizer, fed"),
    "the tokenizer's length": ("sd3", set_on("tokenizer", model_max_length=12), "tokenizer"),
    "a special token": ("sd3", set_on("tokenizer", unk_token="b"), "tokenizer"),
    "an encoder's weights": ("sd3", lambda at: at.weigh("text_encoder_3"), "text_encoder_3"),
    "an encoder's activation": ("sd3", lambda at: at.embed("text_encoder", hidden_act="gelu"), "text_encoder"),
    "an encoder's norm": ("sd3", lambda at: at.embed("text_encoder_3", layer_norm_epsilon=0.1), "text_encoder_3"),
    "an encoder's attention": ("sd3", lambda at: at.attend("text_encoder"), "text_encoder"),
    "an encoder's dtype": ("sd3", lambda at: at.pipeline.text_encoder.to(torch.bfloat16), "text_encoder"),
    "the pipeline's arguments": (
        "sd3",
        lambda at: at.argue(pipeline_kwargs={"max_sequence_length": 8}),
        "pipeline_kwargs, fed",
    ),
    "the image size": ("sd3", At.resize, "size"),
    "a setting of the pipeline": (
        "sd3",
        set_on(None, tokenizer_max_length=12),
        "pipeline.tokenizer_max_length, fed",
    ),
    "what the pipeline registered": (
        "flux2 klein",
        lambda at: at.pipeline.register_to_config(is_distilled=True),
        "pipeline.is_distilled, fed",
    ),
    "the prompt template": (
        "qwen image",
        set_on(None, prompt_template_encode="<|im_start|>system\nDraw.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"),
        "pipeline.prompt_template_encode, fed",
    ),
    "how much of the template is dropped": (
        "qwen image",
        set_on(None, prompt_template_encode_start_idx=30),
        "pipeline.prompt_template_encode_start_idx, fed",
    ),
    "the pipeline's class": ("sd3", At.templated, "pipeline, pipeline_source, fed"),
    "diffusers": ("sd3", library("diffusers"), "diffusers"),
    "transformers": ("sd3", library("transformers"), "transformers"),
    "tokenizers": ("sd3", library("tokenizers"), "tokenizers"),
}


def encode(texts):
    return Conditioning({"words": torch.zeros(len(texts), 2)})


@pytest.mark.parametrize("what", ENCODER)
def test_conditioning_of_another_encoder_is_refused_by_name(what, tmp_path, monkeypatch):
    name, change, differing = ENCODER[what]
    teacher = learned(name)
    cached_conditioning(tmp_path, encoder_key(teacher.pipeline, teacher.contract), ["a cat"], encode)
    at = At(copy.deepcopy(teacher.pipeline), teacher.contract, monkeypatch)
    change(at)
    with pytest.raises(UserError, match=f"from another encoder, which differs in {differing}: give another --cond"):
        cached_conditioning(tmp_path, encoder_key(at.pipeline, at.contract), ["a cat"], encode)


@pytest.mark.parametrize("name", ["sd3", "qwen image"])
def test_the_same_teacher_from_elsewhere_has_the_same_key(name, tmp_path):
    """Saved and loaded, after it was used, and asked twice."""
    teacher = learned(name)
    key = encoder_key(teacher.pipeline, teacher.contract)
    with quiet():
        teacher.pipeline.save_pretrained(tmp_path)
    again = TEACHERS[name].settled(load_pipeline(tmp_path))
    assert encoder_key(again, teacher.contract) == key
    again(["a"], height=32, width=32, num_inference_steps=1, **teacher.contract.pipeline_kwargs)
    assert encoder_key(again, teacher.contract) == key == encoder_key(teacher.pipeline, teacher.contract)


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """No network, and nothing left behind."""
    pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def encoder():
    return learn_image_encoder(learned("sd3").pipeline, learned("sd3").contract)


@pytest.fixture
def table(tmp_path):
    """Pictures, and elsewhere a table of their paths."""
    (tmp_path / "table").mkdir()
    (tmp_path / "elsewhere").mkdir()
    with open(tmp_path / "table" / "train.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "text"])
        for number in range(3):
            path = tmp_path / "elsewhere" / f"{number}.png"
            picture(number).save(path)
            rows.writerow([path, f"picture {number}"])
    return tmp_path / "table"


def configured(**changes):
    return lambda vae: vae.register_to_config(**changes)


def add_to_weights(vae):
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1e-3


VAE = {  # what is changed: how, the names in the sentence
    "weights": (add_to_weights, "vae_weights"),
    "scaling_factor": (configured(scaling_factor=2.0), "vae.scaling_factor"),
    "shift_factor": (configured(shift_factor=0.5), "vae.shift_factor"),
    "latents_mean": (configured(latents_mean=[0.1] * 4), "vae.latents_mean"),
    "norm_num_groups": (configured(norm_num_groups=2), "vae.norm_num_groups"),
    "dtype": (lambda vae: vae.to(torch.bfloat16), "vae_weights, vae_dtype"),
    "tiling": (lambda vae: vae.enable_tiling(), "vae.use_tiling"),
}


@pytest.mark.parametrize("what", VAE)
def test_latents_of_another_vae_are_refused_by_name(what, encoder, table, tmp_path):
    change, differing = VAE[what]
    other = replace(encoder, vae=copy.deepcopy(encoder.vae))
    change(other.vae)
    ImagePairs(tmp_path / "cache", open_dataset(str(table)), encoder, seed=0).move_to(0)
    with pytest.raises(UserError, match=f"another VAE, size or data, which differs in {differing}: give another --im"):
        ImagePairs(tmp_path / "cache", open_dataset(str(table)), other, seed=0).move_to(0)


@pytest.mark.parametrize(
    ("more", "differing"),
    [
        ({"center_crop": True}, "crop, seed"),
        ({"random_flip": True}, "random_flip"),
        ({"seed": 1}, "seed"),
        ({"library": "Pillow"}, "Pillow"),
        ({"library": "diffusers"}, "diffusers"),
        ({"reading": 1}, "reading"),
        ({"caption_column": "image"}, "data"),
    ],
)
def test_latents_of_images_read_otherwise_are_refused_by_name(more, differing, encoder, table, tmp_path, monkeypatch):
    ImagePairs(tmp_path / "cache", open_dataset(str(table)), encoder, seed=0).move_to(0)
    more = dict(more)
    if name := more.pop("library", None):
        library(name)(At(None, None, monkeypatch))
    if reading := more.pop("reading", None):
        monkeypatch.setattr(keys, "READING", reading)
    columns = {name: more.pop(name) for name in ("caption_column",) if name in more}
    with pytest.raises(UserError, match=f"which differs in {differing}: give another --image_cache_dir"):
        pairs = ImagePairs(tmp_path / "cache", open_dataset(str(table), **columns), encoder, **{"seed": 0, **more})
        pairs.move_to(0)


BEHIND = {
    "painted over": lambda path: picture(9).save(path),
    "gone": lambda path: path.unlink(),
    "broken": lambda path: path.write_bytes(b"no image"),
}


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "prepared"])
@pytest.mark.parametrize("what", BEHIND)
def test_an_image_behind_a_path_is_refused_by_name_and_encoded_again(what, streaming, encoder, table, tmp_path):
    def start():
        pairs = ImagePairs(tmp_path / "cache", open_dataset(str(table), streaming=streaming), encoder, seed=0)
        pairs.move_to(0)
        return pairs

    before = start().latents(range(3))
    victim = tmp_path / "elsewhere" / "1.png"
    os.utime(victim)  # the same picture, copied
    assert torch.equal(start().latents(range(3)), before)
    BEHIND[what](victim)
    with pytest.raises(UserError, match=rf"the image {victim} \(row 1\) is not the one .* delete the shard") as error:
        start()
    (shard,) = (tmp_path / "cache").rglob("shard-*")
    assert str(shard) in str(error.value) and "\n" not in str(error.value)
    shard.unlink()
    again = start()
    assert len(again.captions) == (3 if what == "painted over" else 2)
    assert torch.equal(again.latents([0])[0], before[0]) and not torch.equal(again.latents([1])[0], before[1])


def test_one_that_comes_later_is_noticed(encoder, table, tmp_path):
    victim = tmp_path / "elsewhere" / "1.png"
    data = victim.read_bytes()
    victim.unlink()
    ImagePairs(tmp_path / "cache", open_dataset(str(table)), encoder, seed=0).move_to(0)
    victim.write_bytes(data)
    with pytest.raises(UserError, match=rf"the image {victim} \(row 1\) is not the one"):
        ImagePairs(tmp_path / "cache", open_dataset(str(table)), encoder, seed=0).move_to(0)
