# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Small text-image sets in the forms that people have them in, some of the images broken."""

import csv
import io
import random
import tarfile

from PIL import Image


FORMS = ("imagefolder", "parquet", "webdataset")
COLUMNS = {
    "imagefolder": {"image_column": "image", "caption_column": "text"},
    "parquet": {"image_column": "picture", "caption_column": "llava"},
    "webdataset": {"image_column": "jpg", "caption_column": "txt"},
}
SIZES = ((48, 32), (32, 40), (64, 64), (33, 32))


def picture(number: int) -> Image.Image:
    """A smooth one that no other number has."""
    rng = random.Random(number)
    small = Image.new("RGB", (4, 4))
    small.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(16)])
    return small.resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC)


def image_bytes(number: int, broken=()) -> bytes:
    """A JPEG file; a broken one is cut in half, or none at all."""
    buffer = io.BytesIO()
    picture(number).save(buffer, "JPEG")
    data = buffer.getvalue()
    return data if number not in broken else data[: len(data) // 2] if number % 2 else b"no image"


def caption(number: int) -> str:
    return f"picture {number:05}"


def write_image_set(folder, form: str, count: int, broken=()) -> dict[str, str]:
    """Write `count` pairs into `folder`, and return the names of the columns. Every other form spreads over files."""
    folder.mkdir(parents=True)
    if form == "imagefolder":
        with open(folder / "metadata.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "text"])
            rows.writerows((f"{number:05}.jpg", caption(number)) for number in range(count))
        for number in range(count):
            (folder / f"{number:05}.jpg").write_bytes(image_bytes(number, broken))
        return COLUMNS[form]
    for start in range(0, count, 1000):
        numbers = range(start, min(start + 1000, count))
        path = folder / f"train-{start:05}"
        (_write_parquet if form == "parquet" else _write_tar)(path, numbers, broken)
    return COLUMNS[form]


def _write_parquet(path, numbers, broken):
    from datasets import Dataset, Image

    rows = [
        {"picture": {"bytes": image_bytes(n, broken), "path": f"{n:05}.jpg"}, "llava": caption(n), "n": n}
        for n in numbers
    ]
    Dataset.from_list(rows).cast_column("picture", Image()).to_parquet(path.with_suffix(".parquet"), batch_size=100)


def _write_tar(path, numbers, broken):
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for number in numbers:
            for suffix, data in (("jpg", image_bytes(number, broken)), ("txt", caption(number).encode())):
                entry = tarfile.TarInfo(f"{number:05}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
