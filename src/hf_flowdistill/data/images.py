# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Text-image pairs as the adversarial stage uses them: latents on the disk, encoded part by part, and their captions.

A part is the next images of the data that can be used: all, or `images_per_part` and the few that fill its last shard.
Where the data ends, a part goes on with its beginning, so that none but all the data has fewer.
How a training script uses them:

    dataset = open_dataset(args.dataset_name, **dataset_settings(args))   # training.image_arguments
    encoder = learn_image_encoder(pipeline, contract)               # teachers.encode; UserError where it cannot be
    pairs = ImagePairs(image_cache_dir(args), dataset, encoder, **pair_settings(args), rank=rank,
                       world_size=world_size, wait=wait, state=run.state.get("images"))

    if pairs.is_over(images_seen):                                  # before an update; the same on every process
        move_all_but_transformer(pipeline, device)                  # VAE and text encoders are needed
        pairs.move_to(images_seen)
        conditional = cached_conditioning(pairs.folder / "conditioning", key, pairs.captions, ...)
        run.state["images"] = pairs.state                           # JSON; a checkpoint has to keep it
    rows = pairs.rows([images_seen + i for i in indices])           # a function of seed and position
    x0, real = pairs.latents(rows), conditional[rows]

All positions of an update are of the part that `move_to` chose for its first.
"""

import contextlib
import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from hf_flowdistill.data.files import delete_other_parts, part_folder
from hf_flowdistill.data.image_dataset import ImageDataset
from hf_flowdistill.data.image_shards import ImageShards, Shard
from hf_flowdistill.data.shards import LOCK_FILE, claim, clear_unfinished, one_run_at_a_time
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.draws import permutation
from hf_flowdistill.teachers.encode import ImageEncoder


logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 64  # what a crash can cost each process; a multiple of `image_shards.IMAGES_PER_BATCH`
SHARDS_PER_ROUND = 8  # of each process, between two looks at what all have written
SKIPPED_FILE = "skipped.jsonl"


class ImagePairs:
    """The pairs of the current part. A row is a number from 0 to `len(captions) - 1`.

    On the disk, `folder` has index.json, which says what the latents depend on; skipped.jsonl, which names every image
    that was left out; and a folder for each part, with shards as those of the conditioning (see `data.shards`). Only
    the current part is kept, or, without `images_per_part`, everything.

    Attributes:
        captions: of the current part, one for each row.
        folder: of the current part, deleted with it; conditioning of its captions can be kept inside.
        state: where the current part begins, as JSON.
        identity: of the dataset.
    """

    def __init__(
        self,
        folder,
        dataset: ImageDataset,
        encoder: ImageEncoder,
        *,
        seed: int,
        images_per_part: int | None = None,
        center_crop: bool = False,
        random_flip: bool = False,
        rank: int = 0,
        world_size: int = 1,
        wait: Callable[[], None] = lambda: None,
        state: dict[str, int] | None = None,
    ):
        """No image is read yet; `move_to` comes first.

        Args:
            folder: of the cache, on a disk that all processes share.
            seed: of the order of the images, of crops and flips.
            images_per_part: how many pairs are encoded ahead, at least those of an update; all by default.
            center_crop, random_flip: see `image_dataset.fit_image`.
            wait: returns when all processes have called it.
            state: of an earlier `ImagePairs` with the same arguments, to go on with its part.
        """
        self.captions: list[str] = []
        self.state = state or {"first": 0, "row": 0}
        self.identity = dataset.identity
        self._root, self._data, self._seed = Path(folder), dataset.name, seed
        self._images_per_part = images_per_part
        self._rank, self._world_size, self._wait = rank, world_size, wait
        self._shards = ImageShards(
            dataset,
            encoder,
            # so that filling up the last one adds an eighth to a part at most
            rows_per_shard=max(1, min(ROWS_PER_SHARD, (images_per_part or 8 * ROWS_PER_SHARD) // 8)),
            seed=seed,
            center_crop=center_crop,
            random_flip=random_flip,
        )
        self._key = {**self._shards.key, "deleted_after_use": images_per_part is not None}
        self._places: list[tuple[Path, int]] = []
        self._next_row, self._whole = 0, False
        self._permutation = functools.lru_cache(maxsize=4)(self._draw_permutation)

    @property
    def folder(self) -> Path:
        return part_folder(self._root, self.state["row"])

    def is_over(self, position: int) -> bool:
        """Whether the image at `position` is of a later part than the current one. All the data never ends."""
        return not self.captions or (not self._whole and position >= self.state["first"] + len(self.captions))

    def move_to(self, position: int) -> bool:
        """Make the part of the image at `position` the current one; False if it is already.

        Every process calls this, and encodes its share of what is not on the disk. What is there is the same, bit for
        bit, for any number of processes and after any interruption. The parts before are deleted.

        Raises:
            UserError: the data cannot be read, has no usable image, or the folder is the cache of something else.
        """
        if not self.is_over(position):
            return False
        if self.captions:
            self._advance()
        self._load()
        while self.is_over(position):
            if not self.captions and self._whole:
                raise self._nothing_usable()
            self._advance()
            self._load()
        return True

    def rows(self, positions, purpose: str = "images") -> Tensor:
        """The rows of the images at `positions`, [len(positions)] in int64; each `purpose` has its own order.

        Each pass over the part has every image once, in an order that depends on seed, purpose, part and pass.
        """
        passes = [divmod(position - self.state["first"], len(self.captions)) for position in positions]
        return torch.stack(
            [self._permutation(purpose, self.state["first"], number)[place] for number, place in passes]
        )

    def latents(self, rows) -> Tensor:
        """The x0 latents of `rows`: float32 on the CPU, [len(rows), *contract.latent_shape]."""
        latents = []
        for row in torch.as_tensor(rows).tolist():
            path, place = self._places[row]
            with safe_open(path, "pt") as shard:
                latents.append(shard.get_slice("latents")[place : place + 1])
        return torch.cat(latents)

    def _draw_permutation(self, purpose: str, first: int, number: int) -> Tensor:
        return permutation(len(self.captions), self._seed, purpose, "part", first, number)

    def _advance(self) -> None:
        self.state = {"first": self.state["first"] + len(self.captions), "row": self._next_row}

    def _load(self) -> None:
        """Encode what is missing of the part that `state` names, and read what it has."""
        first = self.state["row"] // self._shards.rows_per_shard
        if self._rank == 0:
            self._root.mkdir(parents=True, exist_ok=True)
        # several runs can share what is kept, one after the other adding to it
        lock = self._alone() if self._images_per_part else one_run_at_a_time(self._root, "image")
        with lock if self._rank == 0 else contextlib.nullcontext():
            if self._rank == 0:
                claim(self._root, self._key, "image", "VAE, size or data", "--image_cache_dir")
                self.folder.mkdir(exist_ok=True)
                clear_unfinished(self.folder)
            self._wait()
            found = self._shards.find(self.folder)
            before = dict(found)
            for shard in list(found.values())[self._rank :: self._world_size]:
                shard.check()
            self._wait()  # everyone has looked before anyone writes
            shards = self._encode_missing(first, found)
            self._wait()  # everyone has seen everything before anything goes
            if self._rank == 0:
                self._tell_skipped(shards)
                self._tell_changed(shards)
                for path in {shard.path for shard in found.values()} - {shard.path for shard in shards}:
                    path.unlink()  # empty, written by a process that did not know yet that the data ends before
                if self._images_per_part:
                    delete_other_parts(self.folder)
        self.captions = [caption for shard in shards for caption in shard.captions]
        kept = sum(len(shard.captions) for shard in shards if shard.path in {one.path for one in before.values()})
        if self._rank == 0 and kept:
            logger.info(f"{kept} of {len(self.captions)} images are read from {self._root}")
        self._places = [(shard.path, place) for shard in shards for place in range(len(shard.captions))]
        self._permutation.cache_clear()
        ends = [place for place, shard in enumerate(shards, start=1) if shard.last]
        following = len(shards) - ends[0] if ends else first + len(shards)
        self._next_row, self._whole = following * self._shards.rows_per_shard, bool(ends) and following == first

    def _encode_missing(self, first: int, found: dict[int, Shard]) -> list[Shard]:
        """Encode this process's share of what is not in `found`, and return the shards of the part."""
        shards, missing = self._walk(first, found)
        total = self._images_per_part and self._images_per_part // self._world_size
        with tqdm(total=total, unit="image", desc="encoding", disable=self._rank > 0 or not missing) as progress:
            while missing:
                for number in missing[self._rank :: self._world_size]:
                    progress.update(self._shards.encode(self.folder, number, rank=self._rank))
                self._wait()
                found |= self._shards.find(self.folder, missing)  # at no others: a faster process may be writing them
                if not found.keys() >= set(missing):
                    raise UserError(
                        f"the image cache {self._root} does not show this process what others wrote there: put it on "
                        "a disk that all machines share."
                    )
                shards, missing = self._walk(first, found)
        return shards

    def _walk(self, first: int, found: dict[int, Shard]) -> tuple[list[Shard], list[int]]:
        """The shards from number `first` on until there are enough images, and the numbers of the next missing ones.

        After the last shard comes the first, up to where the part began. A missing one is taken to be full, so that
        none is encoded that might not be needed.
        """
        shards, missing, images, number = [], [], 0, first
        while images < (self._images_per_part or math.inf) and len(missing) < SHARDS_PER_ROUND * self._world_size:
            if number in found:
                shards.append(found[number])
                images += len(found[number].captions)
            else:
                missing.append(number)
                images += self._shards.rows_per_shard
            number = 0 if number in found and found[number].last else number + 1
            if number == first:
                break
        return shards, missing

    def _tell_skipped(self, shards: list[Shard]) -> None:
        """Add what these shards left out to the file of all that was left out, and say so."""
        skipped = [entry for shard in shards for entry in shard.skipped]
        if not skipped:
            return
        file = self._root / SKIPPED_FILE
        known = set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()
        lines = [json.dumps({"row": row, "name": name, "reason": reason}) for row, name, reason in skipped]
        with open(file, "a", encoding="utf-8") as appended:
            appended.writelines(f"{line}\n" for line in lines if line not in known)
        used, (row, name, reason) = sum(len(shard.captions) for shard in shards), skipped[0]
        logger.warning(
            f"{len(skipped)} of {used + len(skipped)} images of the dataset {self._data} are skipped, which "
            f"{file} names; the first is row {row}{f', {name}' if name else ''}: {reason}"
        )

    def _tell_changed(self, shards: list[Shard]) -> None:
        """Say how many images of these shards were enlarged, and of how many only the first picture is used."""
        of = f"of {sum(len(shard.captions) for shard in shards)} images of the dataset {self._data}"
        if enlarged := [entry for shard in shards for entry in shard.enlarged]:
            factor, row, name = max(enlarged)
            logger.warning(
                f"{len(enlarged)} {of} are smaller than what is trained and enlarged, {factor:g} times at most: "
                f"row {row}{f', {name}' if name else ''}"
            )
        if animated := [entry for shard in shards for entry in shard.animated]:
            row, name = animated[0]
            logger.warning(
                f"{len(animated)} {of} have several pictures, of which the first is used; the first such is "
                f"row {row}{f', {name}' if name else ''}"
            )

    def _nothing_usable(self) -> UserError:
        file = self._root / SKIPPED_FILE
        if not file.exists():
            return UserError(f"the dataset {self._data} has no images: choose another --dataset_name or split.")
        first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
        return UserError(
            f"no image of the dataset {self._data} can be used (row {first['row']}: {first['reason']}; {file} "
            "names all): choose other columns or another dataset."
        )

    @contextlib.contextmanager
    def _alone(self):
        """Hold a folder in which parts are deleted: it is one run's, until its process ends or fails."""
        lock = FileLock(self._root / LOCK_FILE, is_singleton=True)
        try:
            if not lock.is_locked:
                lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another run uses the image cache {self._root} and deletes there: give another --image_cache_dir."
            ) from None
        self._held = lock
        try:
            yield
        except BaseException:
            lock.release(force=True)
            raise
