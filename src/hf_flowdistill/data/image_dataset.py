# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Text-image sets of the datasets library, row by row, and one picture of them as a training uses it."""

import contextlib
import io
import itertools
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_flowdistill.data.files import checksum
from hf_flowdistill.data.saved_datasets import is_saved, read_saved
from hf_flowdistill.data.shards import DIGITS, json_digest
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.flow.draws import stream_seed
from hf_flowdistill.teachers.pictures import to_rgb


SECONDS_BETWEEN_TRIES = 1, 2  # of an address that does not answer
LOOKED_AT = 64  # rows, until one can be used
ANIMATED = {"GIF", "PNG", "WEBP", "AVIF", "TIFF"}  # other formats keep views or layers of one picture beside it


class UnusableImage(ValueError):
    """An image or a caption that is left out; the message says why."""


class WrongType(UnusableImage):
    """Something in the place of an image or a caption that can be neither: the column is another."""


class ImageDataset:
    """The rows of a text-image set, in their own order. Pictures are not decoded, and nothing is kept in memory.

    Attributes:
        name: for messages.
        identity: what the rows depend on, as JSON: which files, in which version.
    """

    def __init__(self, name: str, rows, image_column: str, caption_column: str, identity: dict[str, Any]):
        self.name = name
        self.identity = identity
        self._rows = rows
        self._columns = image_column, caption_column
        self._stream, self._position = None, 0

    def rows(self, start: int, count: int) -> Iterator[tuple[int, Any, Any]]:
        """(number, image, caption) of the rows `start` to `start + count`, or to the end of the data.

        A stream is read on from where it is; going back, and starting late, read everything before again.

        Raises:
            UserError: the data cannot be read.
        """
        try:
            for number, row in zip(range(start, start + count), self._read(start, count)):
                image, caption = (row[column] for column in self._columns)
                yield number, image, caption
        except UserError:
            raise
        except Exception as error:  # of the many kinds that files, archives and the Hub have
            raise UserError(f"the dataset {self.name} cannot be read: {first_line(error)}") from error

    def check(self) -> None:
        """Look at the first rows, until one can be used.

        Raises:
            UserError: they are all that there is, a column holds something else, or the data cannot be read.
        """
        number, reason = -1, "it is empty"
        for number, image, caption in self.rows(0, LOOKED_AT):
            try:
                usable_caption(caption)
                open_image(image)
                return
            except UnusableImage as error:
                reason = f"row {number}: {error}" if number == 0 else reason
                if isinstance(error, WrongType):
                    break
        else:
            if number + 1 == LOOKED_AT:
                return
        raise UserError(
            f"no image of the dataset {self.name} can be used ({reason}): choose --image_column and --caption_column "
            "of images and texts, or another dataset."
        )

    def captions(self) -> list[str]:
        """Those that can be used. No image is read.

        Raises:
            UserError: the data cannot be read, or has none.
        """
        column, captions = self._columns[1], []
        alone = ImageDataset(self.name, self._rows.select_columns([column]), column, column, self.identity)
        for _, _, caption in alone.rows(0, sys.maxsize):
            with contextlib.suppress(UnusableImage):
                captions.append(usable_caption(caption))
        if not captions:
            raise UserError(
                f"the dataset {self.name} holds no caption in its column {column}: choose one with --caption_column."
            )
        return captions

    def _read(self, start: int, count: int) -> Iterator[dict]:
        if hasattr(self._rows, "__len__"):
            return (self._rows[number] for number in range(start, min(start + count, len(self._rows))))
        if self._stream is None or start < self._position:
            self._stream, self._position = iter(self._rows), 0
        next(itertools.islice(self._stream, start - self._position, start - self._position), None)
        self._position = start + count
        return itertools.islice(self._stream, count)


def open_dataset(
    name: str,
    config: str | None = None,
    *,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    streaming: bool = False,
) -> ImageDataset:
    """A text-image set: a Hub id, or a folder of images and their metadata.csv, of parquet files or of webdatasets, or
    one that `save_to_disk` wrote.

    Args:
        streaming: read it as it is needed, without downloading or converting it as a whole first.

    Raises:
        UserError: if the dataset cannot be read, or has no such columns.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("--dataset_name needs the datasets library: `pip install datasets`.") from None
    try:
        rows, versions = _open(name, config, split, streaming)
        columns = rows.column_names or list(next(iter(rows), {}))
        for column, argument in ((image_column, "--image_column"), (caption_column, "--caption_column")):
            if column not in columns:
                among = ", ".join(map(str, columns))
                raise UserError(f"the dataset {name} has no column {column}: choose {argument} among {among}.")
        if isinstance((rows.features or {}).get(image_column), datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        rows = rows.select_columns([image_column, caption_column])
    except UserError:
        raise
    except Exception as error:  # of the many kinds that files, archives and the Hub have
        raise UserError(f"the dataset {name} cannot be read: {first_line(error)}") from error
    identity = {
        "config": config,
        "split": split,
        "columns": [image_column, caption_column],
        "files": json_digest(versions)[:16],
    }
    return ImageDataset(name, rows, image_column, caption_column, identity)


def _open(name: str, config: str | None, split: str, streaming: bool) -> tuple[Any, list]:
    """The rows of a split, and what tells its versions apart, as JSON."""
    import datasets

    if is_saved(name):
        rows = read_saved(name, config, split)  # from the disk as they are needed, streaming or not
        return rows, [rows._fingerprint]
    builder = datasets.load_dataset_builder(name, config)
    if streaming:
        rows = builder.as_streaming_dataset(split=split)
    else:
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    return rows, _file_versions(builder.config.data_files or {}, split)


def _file_versions(data_files, split: str) -> list[tuple[str, Any]]:
    """Names and versions of the files of a split, of a slice of one, or of several: "train[:10%]+validation"."""
    names = data_files if split == "all" else [part.partition("[")[0].strip() for part in split.split("+")]
    lists = [data_files.get(name, []) for name in names]
    return [
        (os.path.basename(path), version)
        for files in lists
        for path, version in zip(files, getattr(files, "origin_metadata", []))
    ]


def image_name(image: Any) -> str:
    """What to call an image that cannot be shown; empty where its file has no name."""
    return str(image.get("path") or "") if isinstance(image, dict) else image if isinstance(image, str) else ""


def usable_caption(caption: Any) -> str:
    """The caption without the white space around it.

    Raises:
        UnusableImage: it is blank, or not text.
    """
    if caption is not None and not isinstance(caption, str):
        raise WrongType(f"its caption is no text but a {type(caption).__name__}")
    if not (caption or "").strip():
        raise UnusableImage("it has no caption")
    return caption.strip()


def open_image(image: Any) -> Image.Image:
    """A row's image, upright and in RGB: bytes, a path or address, both in a mapping, or a PIL image.

    See `teachers.pictures.to_rgb`. `info["animated"]` says whether it is the first of several pictures.

    Raises:
        UnusableImage: it is missing or broken, or its pixels cannot be understood.
    """
    source = image
    if not isinstance(image, Image.Image):
        if image is not None and not isinstance(image, (bytes, str, dict)):
            raise WrongType(f"it is no image but {type(image).__name__}")
        image = {"bytes": image} if isinstance(image, bytes) else {"path": image} if isinstance(image, str) else image
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, None)
        source = io.BytesIO(_read_file(path) if data is None else data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which is not used
            with contextlib.nullcontext(source) if source is image else Image.open(source) as opened:
                animated = opened.format in ANIMATED and getattr(opened, "is_animated", False)
                picture = to_rgb(opened)
    except Exception as error:  # of the many kinds that PIL's readers have
        reason = "it is of no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UnusableImage(reason) from error
    picture.info["animated"] = animated
    return picture


def file_behind(image: Any) -> str | None:
    """The file of this machine that a row's image is only the path of; an archive where it is a place in one.

    None where the bytes are in the row, or behind an address, which is not asked again.
    """
    image = {"path": image} if isinstance(image, str) else image
    if not isinstance(image, dict) or image.get("bytes") is not None:
        return None
    path = str(image.get("path") or "").rpartition("::")[2].removeprefix("file://")
    return path if path and "://" not in path else None


def file_version(path: str) -> list | None:
    """Size, time of the last change and digest of a file, as JSON; None if it is not there."""
    try:
        about = os.stat(path)
        return [about.st_size, about.st_mtime_ns, checksum(Path(path))[:DIGITS]]
    except (OSError, ValueError):  # of a path that cannot be one
        return None


def is_changed(path: str, version: list | None) -> bool:
    """Whether `path` has other bytes than when `file_version` made this `version` of it, or is gone."""
    try:
        about = os.stat(path)
        same = version is not None and [about.st_size, about.st_mtime_ns] == version[:2]
    except (OSError, ValueError):
        return version is not None
    return not same and (version is None or (file_version(path) or [])[::2] != version[::2])


def _read_file(path) -> bytes:
    """Of a path or an address; what an address does not answer, but might later, is asked for a few times."""
    if not path:
        raise UnusableImage("it is missing")
    for wait in (*SECONDS_BETWEEN_TRIES, None):
        try:
            with fsspec.open(str(path), "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise UnusableImage("it is missing") from None
        except ImportError as error:
            raise UserError(
                f"the image {path} needs a library that is not installed here ({first_line(error)}): install it."
            ) from error
        except Exception as error:  # of the many kinds that file systems have
            status = getattr(error, "status", None) or 0
            refused = 400 <= status < 500 and status not in (408, 429)  # which are: too slow, too many
            if wait is None or "://" not in str(path) or isinstance(error, ValueError) or refused:
                raise UnusableImage(first_line(error)) from error
        time.sleep(wait)


def fit_image(
    image: Image.Image, height: int, width: int, *, center_crop: bool, random_flip: bool, seed
) -> Image.Image:
    """The image with its shorter side resized to `height` or `width`, and the rest cropped, as diffusers' scripts do.

    Args:
        center_crop: crop to the middle, otherwise anywhere.
        random_flip: mirror every other image.
        seed: of what is random.
    """
    draw = random.Random(seed)
    centering = draw.random(), draw.random()
    image = ImageOps.fit(
        image, (width, height), Image.Resampling.LANCZOS, centering=(0.5, 0.5) if center_crop else centering
    )
    return ImageOps.mirror(image) if random_flip and draw.random() < 0.5 else image


def row_seed(seed: int, row: int) -> int:
    """The `seed` of `fit_image` for a row of the data."""
    return stream_seed(seed, "image", row)
