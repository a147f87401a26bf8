# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Cached conditioning is what the pipelines compute themselves."""

import dataclasses

import pytest
import tiny_pipelines
import tiny_teachers
import torch
from safetensors.torch import load_file, save_file
from teacher_cases import learned
from tiny_pipelines import HEIGHT, WIDTH
from toy_pipeline import toy

from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers import Conditioning, encode_prompts, learn_contract


BARE = {"complex_human_instruction": None}
SANA = {"use_resolution_binning": False, "max_sequence_length": 16}
CASES = {
    "sd3": (tiny_pipelines.stable_diffusion_3, {"max_sequence_length": 16}),
    "sana": (tiny_pipelines.sana, SANA),
    "flux": (tiny_pipelines.flux, {"max_sequence_length": 16}),
}
PROMPTS = ["a red ball", "two cats", "x", "4 dogs", "a"]


@pytest.fixture(scope="module", params=CASES)
def teacher(request):
    build, kwargs = CASES[request.param]
    pipeline = build()
    return pipeline, learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs=kwargs)


def assert_same(a, b, atol=1e-6):
    assert a.tensors.keys() == b.tensors.keys()
    torch.testing.assert_close(a.tensors, b.tensors, atol=atol, rtol=0)


def test_rows_of_a_batch_are_the_prompts_alone(teacher):
    together, unconditional = encode_prompts(*teacher, PROMPTS, batch_size=2)
    assert len(together) == 5 and len(unconditional) == 1
    for row, prompt in enumerate(PROMPTS):
        alone, _ = encode_prompts(*teacher, [prompt])
        assert_same(together[row], alone)
    first, second = together.tensors["encoder_hidden_states"][:2]
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name", ["qwen image", "z image", "lumina", "cogview4", "kandinsky5", "bria fibo", "ernie image"]
)
def test_no_row_is_padded_where_lengths_differ(name):
    case = learned(name)
    long = "a red ball on a long green bench"  # CogView4 has texts of 16, 32, ... tokens
    prompts = [long, *PROMPTS, long]
    rows, _ = encode_prompts(case.pipeline, case.contract, prompts)
    assert case.contract.prompts_at_once == (name == "z image")
    lengths = next(tensor for key, tensor in rows.tensors.items() if key.endswith(".length"))
    assert len(set(lengths.tolist())) > 1 and lengths[0] == lengths[-1]
    longest_first = Conditioning.cat([rows[[3, 0]], encode_prompts(case.pipeline, case.contract, ["x"])[0]])
    sigma = torch.full((3,), 0.5)
    x_t = torch.randn(3, *case.contract.latent_shape, generator=torch.Generator().manual_seed(0))
    calls = []
    hook = case.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        together = case.contract.velocity(case.pipeline.transformer, x_t, sigma, longest_first)
        hook.remove()
        for row, prompt in enumerate(["x", long, "x"]):
            alone, _ = encode_prompts(case.pipeline, case.contract, [prompt])
            expected = case.contract.velocity(case.pipeline.transformer, x_t[[row]], sigma[[row]], alone)
            torch.testing.assert_close(together[[row]], expected, atol=1e-5, rtol=0)
    assert len(calls) == (1 if name == "z image" else 2)


def test_runs_the_text_encoders_only(teacher):
    pipeline, contract = teacher
    ran = []
    hooks = [pipeline.transformer.register_forward_hook(lambda *_: ran.append("transformer"))]
    hooks += [next(pipeline.transformer.children()).register_forward_hook(lambda *_: ran.append("block"))]
    hooks += [pipeline.vae.decoder.register_forward_hook(lambda *_: ran.append("vae"))]
    conditional, unconditional = encode_prompts(pipeline, contract, PROMPTS)
    for hook in hooks:
        hook.remove()
    assert "block" not in ran and "vae" not in ran
    assert not any(tensor.requires_grad for tensor in conditional.tensors.values())
    assert not any(tensor.is_inference() for tensor in unconditional.tensors.values())


def test_unconditional_half_is_the_negative_prompt(teacher):
    pipeline, contract = teacher
    _, empty = encode_prompts(pipeline, contract, ["a cat"])
    _, other_prompt = encode_prompts(pipeline, contract, ["4 dogs"])
    assert_same(empty, other_prompt)
    _, negative = encode_prompts(pipeline, contract, ["a cat"], negative_prompt="bad")
    as_prompt, _ = encode_prompts(pipeline, contract, ["bad"])
    difference = negative.tensors["encoder_hidden_states"] - empty.tensors["encoder_hidden_states"]
    assert difference.abs().max() > 1e-2
    if contract.pipeline_class != "SanaPipeline":
        assert_same(negative, as_prompt)


def test_sana_templates_the_prompt_and_not_the_negative_one():
    pipeline = tiny_pipelines.sana()
    instruction = {"complex_human_instruction": ["say it", "in colours"]}
    templated = learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs={**SANA, **instruction})
    bare = learn_contract(
        pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs={**SANA, "complex_human_instruction": None}
    )
    conditional, unconditional = encode_prompts(pipeline, templated, ["a cat"], negative_prompt="bad")
    own = pipeline.encode_prompt(
        ["a cat"], True, negative_prompt=["bad"], device="cpu", max_sequence_length=16, **instruction
    )
    names = ("encoder_hidden_states", "encoder_attention_mask")
    assert_same(conditional, Conditioning(dict(zip(names, own[:2], strict=True))))
    assert_same(unconditional, Conditioning(dict(zip(names, own[2:], strict=True))))
    as_prompt, _ = encode_prompts(pipeline, templated, ["bad"])
    bare_prompt, bare_negative = encode_prompts(pipeline, bare, ["bad"], negative_prompt="bad")
    assert (unconditional.tensors[names[0]] - as_prompt.tensors[names[0]]).abs().max() > 1e-2
    assert_same(unconditional, bare_negative)
    assert_same(unconditional, bare_prompt)


TRIM = ("encoder_hidden_states", "encoder_attention_mask")


def test_padded_rows_give_what_unpadded_ones_do():
    """SANA's transformer has a mask: texts of three lengths side by side, and each alone without any padding."""
    pipeline = tiny_pipelines.sana()
    contract = learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs=SANA | BARE)
    full, unconditional = encode_prompts(pipeline, contract, ["a", "two dogs", "4 cats!"], negative_prompt="bad")

    def trimmed(row):
        length = int(row.tensors["encoder_attention_mask"].sum())
        return Conditioning({name: row.tensors[name][:, :length] for name in TRIM})

    alone, negative = [trimmed(full[row]) for row in range(3)], trimmed(unconditional)
    lengths = [row.tensors[TRIM[0]].shape[1] for row in alone]
    assert len(set(lengths)) == 3 and negative.tensors[TRIM[0]].shape[1] not in lengths
    together = Conditioning.cat(alone)
    assert together.tensors[TRIM[0]].shape[:2] == together.tensors[TRIM[1]].shape == (3, max(lengths))

    generator = torch.Generator().manual_seed(0)
    x_t, sigma = torch.randn(3, *contract.latent_shape, generator=generator), torch.tensor([0.9, 0.5, 0.1])
    padded = contract.velocity(pipeline.transformer, x_t, sigma, together)
    guided = contract.guided_velocity(pipeline.transformer, x_t, sigma, together, negative, 3.0)
    for row in range(3):
        one = x_t[[row]], sigma[[row]]
        expected = contract.velocity(pipeline.transformer, *one, alone[row])
        torch.testing.assert_close(padded[[row]], expected, atol=1e-5, rtol=0)
        without = contract.velocity(pipeline.transformer, *one, negative)
        torch.testing.assert_close(guided[[row]], without + 3 * (expected - without), atol=1e-5, rtol=0)
    ones = {**together.tensors, TRIM[1]: torch.ones_like(together.tensors[TRIM[1]])}
    unmasked = contract.velocity(pipeline.transformer, x_t, sigma, Conditioning(ones))
    assert (unmasked - padded).abs().max() > 1e-3


TRANSFORMERS = {
    "qwen": (
        tiny_teachers.qwen_image,
        "encoder_hidden_states_mask",
        lambda n: {"hidden_states": torch.ones(n, 4, 16).cumsum(1) / 4, "img_shapes": [[(1, 2, 2)]] * n},
    ),
    "lumina2": (
        tiny_teachers.lumina2,
        "encoder_attention_mask",
        lambda n: {"hidden_states": torch.ones(n, 4, 4, 4).cumsum(2) / 4},
    ),
}


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_padding_where_a_pipeline_pads_to_the_longest_of_a_batch(case):
    """Transformers of pipelines whose texts are as long as they are; the mask is all that tells the padding."""
    build, mask, more = TRANSFORMERS[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = build().transformer.eval()
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        texts = [torch.randn(1, length, 16) for length in (3, 7, 5)]
    rows = [
        Conditioning({"encoder_hidden_states": text, mask: torch.ones(1, text.shape[1], dtype=torch.bool)})
        for text in texts
    ]

    @torch.no_grad()
    def output(row):
        timestep = torch.full((len(row),), 0.3)
        return transformer(timestep=timestep, **row.tensors, **more(len(row)), return_dict=False)[0]

    joined = Conditioning.cat(rows)
    together = output(joined)
    unmasked = output(Conditioning({**joined.tensors, mask: torch.ones_like(joined.tensors[mask])}))
    for row, alone in enumerate(rows):
        torch.testing.assert_close(together[[row]], output(alone), atol=1e-4, rtol=1e-4)
    assert (unmasked[0] - together[0]).abs().max() > 1e-2


def test_no_t5_tokens_at_all():
    pipeline = tiny_pipelines.stable_diffusion_3(with_t5=False)
    contract = learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs={"max_sequence_length": 0})
    conditional, unconditional = encode_prompts(pipeline, contract, PROMPTS)
    assert conditional.tensors["encoder_hidden_states"].shape == (5, 16, 32)
    assert unconditional.tensors["encoder_hidden_states"].shape == (1, 16, 32)


def test_empty_sequences_are_kept():
    rows = Conditioning({"text": torch.zeros(2, 0, 8)})
    assert Conditioning.cat([rows[1], rows]).tensors["text"].shape == (3, 0, 8)
    assert rows[0].expand(4).tensors["text"].shape == (4, 0, 8)


def test_survives_safetensors(teacher, tmp_path):
    for part in encode_prompts(*teacher, PROMPTS):
        save_file(part.tensors, tmp_path / "part.safetensors")
        assert_same(Conditioning(load_file(tmp_path / "part.safetensors")), part, atol=0)


def test_a_negative_prompt_that_the_pipeline_does_not_take():
    case = learned("flux2 klein")
    with pytest.raises(UserError, match="Flux2KleinPipeline takes no negative prompt"):
        encode_prompts(case.pipeline, case.contract, ["a cat"], negative_prompt="bad")


def test_a_prompt_that_changes_what_was_learned_to_be_constant():
    case = learned("z image")
    contract = dataclasses.replace(case.contract, static={**case.contract.static, "return_dict": True})
    with pytest.raises(UserError, match="argument return_dict is another one for the prompt 'a cat'"):
        encode_prompts(case.pipeline, contract, ["a cat"])


def test_a_prompt_that_is_encoded_unlike_the_others(monkeypatch):
    """Which of a batch it is, before anything is trained with it."""
    pipeline = toy()
    contract = learn_contract(pipeline, height=8, width=8)
    own, prompts = pipeline.encode, ["a cat", "an extraordinarily long prompt", "a dog"]

    def longer(texts):
        words = own(texts)
        return torch.cat([words] * 2, 1) if any("extra" in text for text in texts) else words

    def failing(texts):
        if any("extra" in text for text in texts):
            raise ValueError("too many words\nfor this pipeline")
        return own(texts)

    for encode, problem in (
        (longer, "its transformer's argument words has another shape"),
        (failing, r"it fails \(too many words\)"),
    ):
        monkeypatch.setattr(pipeline, "encode", encode)
        with pytest.raises(UserError, match=f"ToyPipeline: {problem} for the prompt '{prompts[1]}', unlike for those"):
            encode_prompts(pipeline, contract, prompts)
        assert len(encode_prompts(pipeline, contract, prompts[::2])[0]) == 2


@pytest.mark.parametrize("prompts", [[], "a cat", ["a cat", None]])
def test_prompts_must_be_a_list_of_strings(teacher, prompts):
    with pytest.raises(UserError, match="list"):
        encode_prompts(*teacher, prompts)


def rows(n=3, guidance=True):
    tensors = {"text": torch.arange(n * 4.0).reshape(n, 2, 2), "mask": torch.ones(n, 2, dtype=torch.int64)}
    return Conditioning({**tensors, "embedded_guidance": torch.full((n,), 3.7)} if guidance else tensors)


def test_selection():
    assert len(rows()) == 3
    assert_same(rows()[1], rows()[[1]])
    assert_same(rows()[torch.tensor([2, 0])], Conditioning.cat([rows()[2], rows()[0]]))
    assert_same(rows()[1:], rows()[[1, 2]])
    assert_same(rows()[0].expand(2), rows()[[0, 0]])
    assert rows().expand(3).tensors["text"].shape == (3, 2, 2)


def test_casts_what_may_be_cast():
    cast = rows().to("cpu", torch.bfloat16).tensors
    assert {name: tensor.dtype for name, tensor in cast.items()} == {
        "text": torch.bfloat16,
        "mask": torch.int64,
        "embedded_guidance": torch.float32,
    }


def test_embedded_guidance_is_replaced_in_a_copy():
    before = rows()
    assert before.with_embedded_guidance(1.0).tensors["embedded_guidance"].tolist() == [1.0] * 3
    assert before.tensors["embedded_guidance"][0] == torch.tensor(3.7)
    without = rows(guidance=False)
    assert without.with_embedded_guidance(1.0) is without


def test_mistakes():
    with pytest.raises(ValueError, match="single row"):
        rows(3).expand(6)
    with pytest.raises(ValueError, match="one row per prompt"):
        Conditioning({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="cannot join"):
        Conditioning.cat([rows(), rows(guidance=False)])
    for no_mask in ({}, {"mask": torch.ones(1, 2)}, {"mask": torch.ones(1, 5)}, {"mask": 0.5 * torch.ones(1, 3)}):
        short = {"text": torch.zeros(1, 2), **{name: torch.ones(1, 2) for name in no_mask}}
        with pytest.raises(
            ValueError, match="cannot join rows of '(text|mask)' of shapes .*: no mask has their length"
        ):
            Conditioning.cat([Conditioning(short), Conditioning({"text": torch.zeros(1, 3), **no_mask})])
