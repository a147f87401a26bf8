# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a tokenizer cuts off is told, and so is that two prompts became the same; encoding is what it was."""

import functools

import pytest
import torch
from teacher_cases import learned

from hf_flowdistill.data.cache import cached_conditioning
from hf_flowdistill.teachers import encode_batch
from hf_flowdistill.teachers.tokens import fed_to_encoders, watched_tokenizers


SHORT = [f"{number} cats" for number in range(15)]
LONG = " ".join(f"{number} red" for number in range(600))
KEY = {"encoder": "a"}


def rows(name, texts, folder):
    teacher = learned(name)
    encode = functools.partial(encode_batch, teacher.pipeline, teacher.contract)
    watched = functools.partial(watched_tokenizers, teacher.pipeline)
    return cached_conditioning(folder, KEY, texts, encode, watched=watched)


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "lumina2"])
def test_prompts_that_are_cut_to_the_same_tokens_are_told(name, tmp_path):
    """The two are encoded in different batches, of 16 and of 2."""
    texts = [LONG + " dogs", *SHORT, LONG + " big birds", "a ball"]
    first = rows(name, texts, tmp_path)
    words = first.losses(texts)
    assert words.startswith("2 of 18 prompts are longer than the teacher takes and are cut, 2 by tokenizer")
    assert "the longest has " in words and f", '{LONG[:60]}...'" in words
    assert words.endswith("; 1 of 18 prompts have the same conditioning as another one")
    later = rows(name, texts, tmp_path)  # nothing is encoded any more
    assert later.losses(texts) == words and later.losses(texts[1:3]) != words


def test_each_tokenizer_has_its_own_length(tmp_path):
    """CLIP reads a word or a few letters as a token, T5 here single letters."""
    words = rows("sd3", ["a cat", "a red ball, a blue ball"], tmp_path).losses(["a cat", "a red ball, a blue ball"])
    assert words == (
        "1 of 2 prompts are longer than the teacher takes and are cut, 1 by tokenizer to 16 tokens, 1 by tokenizer_2 "
        "to 16 tokens, 1 by tokenizer_3 to 16 tokens: the longest has 25, 'a red ball, a blue ball'"
    )


def test_what_is_taken_whole_is_not_mentioned(tmp_path):
    assert rows("sd3", SHORT, tmp_path).losses(SHORT) == ""


@pytest.mark.parametrize("name", ["sd3", "qwen image", "flux2 klein"])
def test_watching_changes_nothing(name):
    teacher = learned(name)
    encode = functools.partial(encode_batch, teacher.pipeline, teacher.contract, SHORT[:3])
    classes = {name: type(part) for name, part in teacher.pipeline.components.items()}
    plain = encode()
    with watched_tokenizers(teacher.pipeline, SHORT[:3]) as made:
        again = encode()
    assert {name: type(part) for name, part in teacher.pipeline.components.items()} == classes
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in plain.tensors.items())
    assert len({tokens.digest for tokens in made}) == 3 and not any(tokens.cut for tokens in made)


@pytest.mark.parametrize("name", ["sd3", "qwen image", "flux2"])
def test_what_encoders_are_fed_has_the_ids_of_every_text(name):
    teacher = learned(name)
    hooks = [len(m._forward_hooks) for m in teacher.pipeline.text_encoder.modules()]
    fed = fed_to_encoders(teacher.pipeline, teacher.contract)
    calls = [call for call in fed if isinstance(call, list)]
    assert len(calls) >= 3 and all("int64" in str(call) for call in calls)
    assert fed == fed_to_encoders(teacher.pipeline, teacher.contract)
    assert hooks == [len(m._forward_hooks) for m in teacher.pipeline.text_encoder.modules()]
