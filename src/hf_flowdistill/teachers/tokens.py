# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What becomes of a text before it is encoded: what the encoders are fed, and what tokenizers cut off."""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_flowdistill.teachers.conditioning import encode_batch, encode_unconditional
from hf_flowdistill.teachers.learning import PROMPTS


LONG = " ".join(f"{number} {word}," for number in range(60) for word in ("red", "Cats"))  # than what CLIP takes


def fed_to_encoders(pipeline, contract) -> list:
    """What the networks among the pipeline's text encoders are fed for a short, a longer, a very long and no prompt,
    as JSON: token ids, masks, and what else is not computed by a network before.

    It costs encoding these. The pipeline is left as it was.
    """
    networks = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module) and name not in ("transformer", "vae")
    }
    fed, inside, hooks = [], [], []

    def enter(name, module, args, kwargs):
        if not inside:  # a pipeline may call a part of its encoder
            fed.append([name, _described(args), _described(kwargs)])
        inside.append(module)

    def leave(*_):
        inside.pop()

    for name, network in networks.items():
        for module in network.modules():
            hooks.append(module.register_forward_pre_hook(functools.partial(enter, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        for texts in (PROMPTS, [LONG]):
            fed.append(_reason(encode_batch, pipeline, contract, texts))
        fed.append(_reason(encode_unconditional, pipeline, contract))
    finally:
        for hook in hooks:
            hook.remove()
    return fed


def _reason(encode, *args) -> str:
    """Encode, and say why that cannot be, if so; what is to be trained on tells the user."""
    try:
        encode(*args)
    except (ValueError, LookupError) as error:  # `UserError`; and of tokens that a network does not have
        return type(error).__name__
    return ""


def _described(value: Any) -> Any:
    """`value` as JSON; of floating tensors, which may be computed, the shape only, unless they are masks."""
    if isinstance(value, Tensor):
        computed = value.is_floating_point() and value.ndim > 2
        content = "" if computed else hashlib.sha256(repr(value.tolist()).encode()).hexdigest()[:16]
        return [str(value.dtype), list(value.shape), content]
    if isinstance(value, dict):
        return {str(name): _described(part) for name, part in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_described(part) for part in value]
    return value if isinstance(value, (str, int, float, bool)) else None


@dataclass
class TextTokens:
    """What the tokenizers made of one text.

    Attributes:
        cut: tokenizer -> (tokens that the text has, tokens that are left of them), of those that cut it.
        digest: the same for texts that became the same tokens everywhere; "" if that is not known.
    """

    cut: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: list = field(default_factory=list)

    @property
    def digest(self) -> str:
        return hashlib.blake2b(repr(self.kept).encode(), digest_size=6).hexdigest() if self.kept else ""


@contextlib.contextmanager
def watched_tokenizers(pipeline, texts: Sequence[str]) -> Iterator[list[TextTokens]]:
    """Inside, while `texts` are encoded once, what the pipeline's tokenizers do with each is written into the list.

    Calls that may cut are looked at only.
    """
    found = [TextTokens() for _ in texts]
    tokenizers = {}
    for name, component in pipeline.components.items():
        tokenizer = getattr(component, "tokenizer", component)
        if hasattr(tokenizer, "get_vocab") and all(tokenizer is not other for other in tokenizers.values()):
            tokenizers[name] = tokenizer
    classes = {name: type(tokenizer) for name, tokenizer in tokenizers.items()}
    for name, tokenizer in tokenizers.items():
        note = functools.partial(_note, name, dict(zip(texts, found)))
        tokenizer.__class__ = _watched_class(classes[name], note)  # what Python calls is the class's __call__
    try:
        yield found
    finally:
        for name, tokenizer in tokenizers.items():
            tokenizer.__class__ = classes[name]


def _watched_class(cls: type, note) -> type:
    """`cls`, whose calls that may cut are told to `note`: texts, ids that are kept, how many there were, limit."""

    def call(self, text=None, *args, **kwargs):
        result = cls.__call__(self, text, *args, **kwargs)
        if text is not None and kwargs.get("truncation"):
            texts = [text] if isinstance(text, str) else list(text)
            if all(isinstance(part, str) for part in texts):
                special = kwargs.get("add_special_tokens", True)
                whole = cls.__call__(self, texts, add_special_tokens=special)["input_ids"]
                limit = kwargs.get("max_length") or self.model_max_length
                note(texts, _kept(result, len(texts)), [len(ids) for ids in whole], limit)
        return result

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _note(name: str, found: dict[str, TextTokens], texts, kept, lengths, limit) -> None:
    """One call of the tokenizer `name` with `texts`, which are those of `found` in their order, or one that has some
    of them in it: pipelines put templates around texts, and some go text by text."""
    for i, text in enumerate(texts):
        within = list(found) if len(texts) == len(found) else [part for part in found if part in text]
        if within:
            tokens = found[within[i] if len(texts) == len(found) else max(within, key=len)]
            tokens.kept.append([name, kept[i]])
            if lengths[i] > limit:
                tokens.cut[name] = lengths[i], limit


def _kept(result, n: int) -> list[list[int]]:
    """The ids of each of `n` texts in what a tokenizer returned, without padding where there is a mask of it."""

    def rows(value):
        value = value.tolist() if isinstance(value, Tensor) else list(value)
        return value if isinstance(value[0], list) else [value]

    ids, mask = rows(result["input_ids"]), result.get("attention_mask")
    if mask is None or len(ids) != n:
        return ids
    return [[token for token, keep in zip(*both) if keep] for both in zip(ids, rows(mask))]
