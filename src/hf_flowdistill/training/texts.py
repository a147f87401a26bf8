# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The prompts of a training and what its networks are fed for them: encoded before it, or part by part with images."""

import functools
import logging
from pathlib import Path

from hf_flowdistill.data.arguments import dataset_settings, image_cache_dir, pair_settings, prompt_parts_dir
from hf_flowdistill.data.cache import cached_conditioning
from hf_flowdistill.data.image_dataset import ImageDataset, open_dataset
from hf_flowdistill.data.images import ImagePairs
from hf_flowdistill.data.keys import component_digests, encoder_key
from hf_flowdistill.data.prompt_parts import PromptParts
from hf_flowdistill.data.stream import PromptStream
from hf_flowdistill.methods.method import Size
from hf_flowdistill.networks.placement import move_all_but_transformer, place_text_encoders
from hf_flowdistill.teachers import encode_batch, encode_unconditional, first_alike
from hf_flowdistill.teachers.encode import learn_image_encoder
from hf_flowdistill.teachers.tokens import fed_to_encoders, watched_tokenizers
from hf_flowdistill.training.teacher import Teacher


logger = logging.getLogger(__name__)


class Texts:
    """Prompts, and their conditioning at every image size.

    Attributes:
        prompts: which sample has which.
        sizes: one for each of the teacher's contracts.
        parts: of text-image pairs, whose captions the prompts then are, or of prompts; None where all prompts are at
            hand.
    """

    def __init__(self, args, accelerator, teacher: Teacher, parts: ImagePairs | PromptParts | None = None):
        """Nothing is encoded yet; `take` comes first."""
        self.parts = parts
        self.prompts: PromptStream | None = None
        self.sizes: list[Size] = []
        self._args, self._accelerator, self._teacher = args, accelerator, teacher
        self._keys: dict[tuple[int, int], dict] = {}  # of the sizes' caches
        self._components: dict[str, str] = {}

    @property
    def pairs(self) -> ImagePairs | None:
        return None if isinstance(self.parts, PromptParts) else self.parts

    @property
    def state(self) -> dict:
        """What a checkpoint has to keep."""
        return {} if self.pairs is None else {"images": self.pairs.state}

    def take(self, prompts: list[str], images_seen: int) -> None:
        """Encode `prompts`, or the part that follows `images_seen` images; all processes together.

        The text encoders and the VAE are on the device meanwhile.
        """
        pipeline, device = self._teacher.pipeline, self._accelerator.device
        if self.pairs is not None:
            pipeline.vae.to(device)
        if self.parts is not None:
            self.parts.move_to(images_seen)
            prompts = self.parts.captions
        self.prompts = PromptStream(prompts, self._args.seed)
        place_text_encoders(pipeline, device)
        self.sizes = self._encode_sizes()
        kept = self.parts is not None or self._accelerator.is_main_process  # to decode samples, or for the next part
        move_all_but_transformer(pipeline, "cpu" if kept else "meta")

    def follow(self, images_seen: int) -> None:
        """Go on with the next part where the one at hand is over."""
        if self.parts is not None and self.parts.is_over(images_seen):
            self.take([], images_seen)

    def _encode_sizes(self) -> list[Size]:
        """Those of all contracts; sizes whose conditioning is the same, bit for bit, share it."""
        with self._teacher.on_device():
            alike = first_alike(self._teacher.pipeline, self._teacher.contracts)
        sizes = []
        for contract, first in zip(self._teacher.contracts, alike):
            shared = first < len(sizes)
            sizes.append(sizes[first]._replace(contract=contract) if shared else self._encode(contract, bool(sizes)))
        return sizes

    def _encode(self, contract, later: bool) -> Size:
        """Conditioning of the training, the validation and the negative prompts, read from a cache on the disk."""
        args, accelerator, pipeline = self._args, self._accelerator, self._teacher.pipeline
        # a cache is of one size; those whose conditioning is another than the first's have theirs inside it
        part = f"{contract.height}x{contract.width}" if later else ""
        home = Path(args.output_dir) if self.parts is None else self.parts.folder
        cached = functools.partial(
            cached_conditioning,
            Path(args.conditioning_cache_dir or home / "conditioning", part),
            self._key(contract),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            wait=accelerator.wait_for_everyone,
        )

        def encode(texts, encode=encode_batch):
            with self._teacher.on_device():
                return encode(pipeline, contract, texts)

        texts, watched = self.prompts.distinct, functools.partial(watched_tokenizers, pipeline)
        conditional = cached(texts, encode, watched=watched)
        # apart, so that changing them on resume cannot touch the last digit of the others
        validation = cached(args.validation_prompts, encode, watched=watched) if args.validation_prompts else None
        unconditional = cached(
            [args.negative_prompt],
            lambda texts: encode(*texts, encode=encode_unconditional),
            role="negative prompt",
        )
        logger.info(f"{conditional.origin()}; {conditional[0].nbytes:,} bytes each")
        for rows, of, kind in (
            (conditional, texts, "prompts"),
            (validation, args.validation_prompts, "validation prompts"),
        ):
            if rows is not None and (losses := rows.losses(of, kind)):
                logger.warning(losses)
        return Size(contract, conditional, unconditional[0].to(accelerator.device), validation)

    def _key(self, contract) -> dict:
        """What a cache for the contract's size is known by; all encoders are read for the first only."""
        size, pipeline = (contract.height, contract.width), self._teacher.pipeline
        if size not in self._keys:
            self._components = self._components or component_digests(pipeline)
            with self._teacher.on_device():
                fed = fed_to_encoders(pipeline, contract)
            self._keys[size] = encoder_key(pipeline, contract, components=self._components, fed=fed)
        return self._keys[size]


def open_prompt_parts(args, accelerator) -> PromptParts | None:
    """The prompts that the arguments say are read a part at a time, if they are."""
    if not args.prompts_per_part:
        return None
    return PromptParts(
        prompt_parts_dir(args),
        args.dataset_name,
        args.dataset_config_name,
        args.caption_column,
        prompts_per_part=args.prompts_per_part,
        is_main=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )


def open_images(args) -> ImageDataset:
    """The text-image set that the arguments name, of which some pair can be used.

    Raises:
        UserError: the dataset cannot be read, or has no images and captions in these columns.
    """
    dataset = open_dataset(args.dataset_name, **dataset_settings(args))
    dataset.check()
    return dataset


def open_pairs(args, accelerator, teacher: Teacher, dataset: ImageDataset, state: dict | None) -> ImagePairs:
    """The text-image pairs of `dataset`; `state` is that of a checkpoint, or None.

    Raises:
        UserError: the teacher's VAE cannot encode.
    """
    with teacher.on_device():
        encoder = learn_image_encoder(teacher.pipeline, teacher.contracts[0])
    return ImagePairs(
        image_cache_dir(args),
        dataset,
        encoder,
        **pair_settings(args),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
        state=state,
    )
