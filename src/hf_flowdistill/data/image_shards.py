# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Shards of latents of a text-image set, on the disk: how one is made and what it says about itself."""

import functools
import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_flowdistill.data.image_dataset import (
    ImageDataset,
    UnusableImage,
    file_behind,
    file_version,
    fit_image,
    image_name,
    is_changed,
    open_image,
    row_seed,
    usable_caption,
)
from hf_flowdistill.data.keys import image_encoder_key
from hf_flowdistill.data.shards import check_shard, corrupt, json_digest, read_about, write_shard
from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers.encode import ImageEncoder


IMAGES_PER_BATCH = 8
ABOUT = "captions", "skipped", "enlarged", "animated", "last"  # what a shard says, as in `Shard`


@dataclass(frozen=True)
class Shard:
    """What of some rows of the data can be used. `last` says that the data ends in it."""

    path: Path
    captions: list[str]
    skipped: list[list]  # number of the row, name, reason
    enlarged: list[list]  # by how much, number of the row, name: of those smaller than the latents' images
    animated: list[list]  # number of the row, name: of those of which only the first picture is used
    last: bool

    def check(self) -> None:
        """Raise `UserError` if the shard is damaged, or of images of which a file is not the same any more."""
        check_shard(self.path)
        for row, path, version in read_about(self.path, "images")["files"]:  # not kept: one for each image
            if is_changed(path, version):
                raise UserError(
                    f"the image {path} (row {row}) is not the one that the shard {self.path} holds, it was changed or "
                    "is gone: put it back, or delete the shard, and its images are encoded again."
                )


class ImageShards:
    """Makes and finds the shards of one set, size and VAE; shard n has the rows n * rows_per_shard and following.

    Attributes:
        key: all that the shards depend on, as JSON.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        encoder: ImageEncoder,
        *,
        rows_per_shard: int,
        seed: int,
        center_crop: bool,
        random_flip: bool,
    ):
        self.rows_per_shard = rows_per_shard
        self._dataset, self._encoder, self._seed = dataset, encoder, seed
        self._fit = functools.partial(
            fit_image, height=encoder.height, width=encoder.width, center_crop=center_crop, random_flip=random_flip
        )
        self.key = {
            **image_encoder_key(encoder),
            "data": dataset.identity,
            "crop": "center" if center_crop else "random",
            "random_flip": random_flip,
            "seed": seed if random_flip or not center_crop else None,
            "rows_per_shard": rows_per_shard,
        }

    def find(self, folder: Path, numbers: Container[int] | None = None) -> dict[int, Shard]:
        """Number -> shard, for those that are in `folder`, or for those of them that have these numbers.

        Raises:
            UserError: a shard is damaged, or of something else.
        """
        found = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            number = int("0" + "".join(filter(str.isdigit, path.name.split("-")[1])))
            if numbers is not None and number not in numbers:
                continue
            about = read_about(path, "images")
            if about.get("key") != json_digest(self.key):
                raise UserError(f"the shard {path} is foreign, it was not written for these images: take it away.")
            try:
                found[number] = Shard(path, **{name: about[name] for name in ABOUT})
            except (KeyError, TypeError):
                raise corrupt(path, "it does not say which images it holds") from None
        return found

    def encode(self, folder: Path, number: int, *, rank: int) -> int:
        """Encode the shard with this number into `folder`; how many images it has."""
        about = {name: [] for name in (*ABOUT, "files")}  # files: number of the row, path, version
        latents, batch, rows = [], [], 0
        for row, image, caption in self._dataset.rows(number * self.rows_per_shard, self.rows_per_shard):
            rows += 1
            if (path := file_behind(image)) is not None:
                about["files"].append([row, path, file_version(path)])
            try:
                text = usable_caption(caption)
                batch.append(self._read(row, image, about))
                about["captions"].append(text)
            except UnusableImage as error:
                about["skipped"].append([row, image_name(image), str(error)])
            if len(batch) == IMAGES_PER_BATCH:
                latents.append(self._encoder(batch))
                batch = []
        if batch:
            latents.append(self._encoder(batch))
        about["last"] = rows < self.rows_per_shard
        write_shard(
            folder,
            {"latents": torch.cat(latents)} if latents else {},
            {"images": json.dumps({"key": json_digest(self.key), **about})},
            prefix=f"shard-{number:08}",
            unfinished=f"unfinished-{rank}.tmp",
        )
        return len(about["captions"])

    def _read(self, row: int, image: Any, about: dict[str, list]) -> Image.Image:
        """The picture of a row as it is encoded; what happens to it is added to `about`."""
        picture = open_image(image)
        factor = max(self._encoder.width / picture.width, self._encoder.height / picture.height)
        if factor > 1:
            about["enlarged"].append([round(factor, 2), row, image_name(image)])
        if picture.info["animated"]:
            about["animated"].append([row, image_name(image)])
        return self._fit(picture, seed=row_seed(self._seed, row))
