# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What text-image pairs cost: time per image, and memory while a data set goes by in parts, as JSON.

    OMP_NUM_THREADS=1 python benchmarks/images.py --output_file benchmarks/results/images.json

Of a set that is made for it, of noise (JPEG), of which every hundredth image is broken; for the tests' tiny Stable
Diffusion 3. Memory is that of the process (VmRSS) after each part has been encoded and read once. In the middle of the
part in the middle, another reader starts from what a checkpoint would have kept, with an empty cache; whether it gives
the same latents and captions is in the JSON too.
"""

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from image_sets import FORMS, noise_bytes, write_image_set  # noqa: E402
from teacher_cases import learned  # noqa: E402

from hf_flowdistill.cli import ArgumentParser, silence_libraries  # noqa: E402
from hf_flowdistill.data.image_dataset import open_dataset  # noqa: E402
from hf_flowdistill.data.images import ImagePairs  # noqa: E402
from hf_flowdistill.errors import exit_on_user_error  # noqa: E402
from hf_flowdistill.teachers.encode import learn_image_encoder  # noqa: E402


BATCH = 50


def resident_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def batch_at(pairs, position) -> tuple[list[str], torch.Tensor]:
    """Captions and latents of an update at `position`."""
    rows = pairs.rows(range(position, position + BATCH))
    return [pairs.captions[row] for row in rows], pairs.latents(rows)


def measure(folder: Path, form: str, images: int, images_per_part: int, streaming: bool) -> dict:
    """Go through a set of `images` once, in updates of 50."""
    columns = write_image_set(folder / "data", form, images, set(range(7, images, 100)), noise_bytes)
    size = sum(path.stat().st_size for path in (folder / "data").iterdir())
    encoder = learn_image_encoder(learned("sd3").pipeline, learned("sd3").contract)

    def start(name, state=None):
        data = open_dataset(str(folder / "data"), streaming=streaming, **columns)
        return ImagePairs(folder / name, data, encoder, seed=0, images_per_part=images_per_part, state=state)

    pairs, memory, seconds, kept, used, row = start("cache"), [], 0.0, None, set(), 0
    for position in itertools.count(0, BATCH):
        begin = time.perf_counter()
        moved = pairs.move_to(position)
        seconds += time.perf_counter() - begin
        if pairs.state["row"] < row:  # the part before had the end of the data, and of its beginning what it lacked
            break
        row = pairs.state["row"]
        batch = batch_at(pairs, position)
        if moved:
            used.update(pairs.captions)
            memory.append(round(resident_megabytes(), 1))
        elif position >= images / 2 and kept is None:
            kept = position, json.dumps(pairs.state), batch
    position, state, (captions, latents) = kept
    again = start("another", json.loads(state))
    again.move_to(position)
    resumed = batch_at(again, position)
    skipped = (folder / "cache/skipped.jsonl").read_text().splitlines()
    return {
        "form": form,
        "streaming": streaming,
        "images": images,
        "megabytes": round(size / 2**20, 1),
        "images_per_part": images_per_part,
        "usable": len(used),
        "skipped": len(skipped),
        "images_per_second": round(len(used) / seconds),
        "resident_megabytes_by_part": memory,
        "resumes_exactly": resumed[0] == captions and torch.equal(resumed[1], latents),
    }


def main():
    parser = ArgumentParser(prog="images.py", description=__doc__)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="of the set on the disk")
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="in the set")
    parser.add_argument("--images_per_part", type=int, default=1000, metavar="N", help="see train_sid_dit.py")
    parser.add_argument("--no_streaming", action="store_true", help="convert the set first")
    parser.add_argument("--output_file", metavar="FILE", help="the figures as JSON")
    args = parser.parse_args()
    silence_libraries()
    results = []
    for form in args.forms:
        with tempfile.TemporaryDirectory() as folder:
            results.append(
                measure(Path(folder), form, args.images, args.images_per_part, streaming=not args.no_streaming)
            )
        print(json.dumps(results[-1]), flush=True)
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)()
