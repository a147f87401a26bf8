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


def image_bytes(number: int) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    picture(number).save(buffer, "JPEG")
    return buffer.getvalue()


def noise_bytes(number: int) -> bytes:
    """A JPEG file of 20 kB, which is a lot for its 128 x 128 pixels."""
    noise = Image.frombytes("RGB", (128, 128), random.Random(number).randbytes(128 * 128 * 3))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def spoiled(data: bytes, number: int) -> bytes:
    """A file that is cut in half, or no image at all."""
    return data[: len(data) // 2] if number % 2 else b"no image"


def caption(number: int) -> str:
    return f"picture {number:05}"


def write_image_set(folder, form: str, count: int, broken=(), data_of=image_bytes) -> dict[str, str]:
    """Write `count` pairs into `folder`, of which those whose numbers are `broken` are; return the columns' names."""

    def file_of(number):
        data = data_of(number)
        return spoiled(data, number) if number in broken else data

    folder.mkdir(parents=True)
    if form == "imagefolder":
        with open(folder / "metadata.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "text"])
            rows.writerows((f"{number:05}.jpg", caption(number)) for number in range(count))
        for number in range(count):
            (folder / f"{number:05}.jpg").write_bytes(file_of(number))
        return COLUMNS[form]
    for start in range(0, count, 1000):
        numbers = range(start, min(start + 1000, count))
        path = folder / f"train-{start:05}"
        (_write_parquet if form == "parquet" else _write_tar)(path, numbers, file_of)
    return COLUMNS[form]


def _write_parquet(path, numbers, file_of):
    from datasets import Dataset, Image

    rows = [{"picture": {"bytes": file_of(n), "path": f"{n:05}.jpg"}, "llava": caption(n), "n": n} for n in numbers]
    Dataset.from_list(rows).cast_column("picture", Image()).to_parquet(path.with_suffix(".parquet"), batch_size=100)


def _write_tar(path, numbers, file_of):
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for number in numbers:
            for suffix, data in (("jpg", file_of(number)), ("txt", caption(number).encode())):
                entry = tarfile.TarInfo(f"{number:05}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
