# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Pairs are the same at the same position, whoever encoded them and however often that was interrupted."""

import functools
import io
import json
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from image_sets import FORMS, caption, image_bytes, picture, write_image_set
from PIL import Image
from teacher_cases import learned
from training_helpers import ROOT, run_command

from hf_flowdistill.cli import ArgumentParser
from hf_flowdistill.data.arguments import (
    add_image_arguments,
    check_image_arguments,
    check_parts,
    dataset_settings,
    image_cache_dir,
    pair_settings,
)
from hf_flowdistill.data.image_dataset import UnusableImage, fit_image, open_dataset, open_image, row_seed
from hf_flowdistill.data.images import ImagePairs
from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers.encode import learn_image_encoder


COUNT, BROKEN = 150, {3, 70, 71, 149}
GOOD = [caption(number) for number in range(COUNT) if number not in BROKEN]


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """No network, and nothing left behind."""
    pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def encoder():
    return learn_image_encoder(learned("sd3").pipeline, learned("sd3").contract)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The same pairs in every form: (folder, names of the columns)."""
    root = tmp_path_factory.mktemp("sets")
    return {form: (str(root / form), write_image_set(root / form, form, COUNT, BROKEN)) for form in FORMS}


@pytest.fixture
def start(sets, encoder, tmp_path):
    """A reader of a set, its cache in a folder of this name."""

    def start(name="cache", form="parquet", streaming=True, **more):
        folder, columns = sets[form]
        return ImagePairs(
            tmp_path / name,
            open_dataset(folder, streaming=streaming, **columns),
            encoder,
            **{"seed": 0, "center_crop": True, **more},
        )

    return start


def batch(pairs, position, size=8):
    rows = pairs.rows(range(position, position + size))
    return [pairs.captions[row] for row in rows], pairs.latents(rows)


def assert_same(a, b):
    assert a[0] == b[0] and torch.equal(a[1], b[1])


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "prepared"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pairs(form, streaming, start, encoder, tmp_path, caplog):
    pairs = start(form=form, streaming=streaming)
    assert pairs.move_to(0) and not pairs.move_to(10**9)  # all the data is one part
    assert pairs.captions == GOOD and "4 of 150 images of the dataset" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "cache/skipped.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == sorted(BROKEN)
    assert all(f"{number:05}" in row["name"] for number, row in zip(sorted(BROKEN), rows))
    assert {row["reason"] for row in rows[1:2]} == {"it is of no known format"} and all(row["reason"] for row in rows)

    reference = start("reference", "parquet")
    reference.move_to(0)
    assert torch.equal(pairs.latents(range(len(GOOD))), reference.latents(range(len(GOOD))))
    file = io.BytesIO()
    picture(100).save(file, "JPEG")
    image = fit_image(Image.open(file), 32, 32, center_crop=True, random_flip=False, seed=0)
    latent = pairs.latents([GOOD.index(caption(100))])
    torch.testing.assert_close(latent, encoder([image]), atol=1e-5, rtol=1e-4)
    assert latent.shape == (1, 4, 8, 8) and latent.dtype == torch.float32


def test_every_pass_has_every_pair_once_in_an_order_of_its_own(start):
    pairs = start()
    pairs.move_to(0)
    n = len(GOOD)
    drawn = pairs.rows(range(2 * n))
    passes = drawn[:n].tolist(), drawn[n:].tolist()
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(n)) and passes[0] != passes[1]
    assert pairs.rows(range(n + 5, n + 9)).tolist() == passes[1][5:9]
    others = start(seed=1), start(seed=0)
    for other in others:
        other.move_to(0)
    assert others[0].rows(range(n)).tolist() != passes[0] == others[1].rows(range(n)).tolist()
    assert pairs.rows(range(n), "generator").tolist() != passes[0]


def test_parts_are_the_data_one_after_the_other(start, tmp_path):
    pairs, seen, folders = start(images_per_part=40), [], []
    for position in range(0, 2 * len(GOOD), 4):
        assert pairs.is_over(position) == (moved := pairs.move_to(position))
        if moved:
            seen.append(pairs.captions)
            folders.append([path.name for path in (tmp_path / "cache").glob("part-*")])
            (pairs.folder / "conditioning").mkdir()  # which goes with it
            assert sorted(pairs.rows(range(pairs.state["first"], pairs.state["first"] + len(seen[-1])))) == list(
                range(len(seen[-1]))
            )
    everything = sum(seen, [])
    assert len(everything) >= 2 * len(GOOD) and everything == (3 * GOOD)[: len(everything)]
    assert all(40 <= len(part) < 45 for part in seen) and all(len(there) == 1 for there in folders)
    assert len((tmp_path / "cache/skipped.jsonl").read_text().splitlines()) == len(BROKEN)


def test_where_the_data_ends_a_part_goes_on_with_its_beginning(encoder, tmp_path):
    """33 images in parts of 16: an update of 16 has 16 images, also the third; and resumed, also in two processes."""
    columns = write_image_set(tmp_path / "set", "parquet", 33)
    numbers = [caption(number) for number in range(33)]

    def start(name, **more):
        dataset = open_dataset(str(tmp_path / "set"), streaming=True, **columns)
        return ImagePairs(tmp_path / name, dataset, encoder, seed=0, images_per_part=16, **more)

    pairs, seen = start("cache"), []
    for position in range(0, 96, 16):
        if pairs.move_to(position):
            seen += pairs.captions
        state, (captions, latents) = json.dumps(pairs.state), batch(pairs, position, 16)
        assert len(set(captions)) >= 15  # one beyond a part of 17 takes some of it once more
        again = start(f"from {position}", state=json.loads(state))
        again.move_to(position)
        assert_same(batch(again, position, 16), (captions, latents))
        for one in together(2, functools.partial(start, f"two from {position}", state=json.loads(state)), position):
            assert_same(batch(one, position, 16), (captions, latents))
        assert contents(tmp_path / f"two from {position}") == contents(tmp_path / f"from {position}")
    assert seen == (4 * numbers)[: len(seen)]


def test_more_than_there_is_in_a_part_is_all_of_it(start):
    pairs = start(images_per_part=10_000)
    pairs.move_to(0)
    assert pairs.captions == GOOD and not pairs.is_over(10**9)


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "prepared"])
@pytest.mark.parametrize("images_per_part", [40, None])
def test_resumes_in_the_middle_of_a_part(images_per_part, streaming, start, tmp_path):
    """From what a checkpoint keeps: with the cache, without it, after it went on, and in several processes."""
    pairs, expected = start(images_per_part=images_per_part, streaming=streaming), {}
    for position in range(0, 128, 4):
        if pairs.move_to(position):
            state = json.dumps(pairs.state)
        expected[position] = batch(pairs, position, 4)
        if position == 56:
            kept = state
            shutil.copytree(tmp_path / "cache", tmp_path / "copied")
    del pairs
    shutil.copytree(tmp_path / "cache", tmp_path / "went-on")
    for name in ("copied", "deleted", "went-on"):
        again = start(name, state=json.loads(kept), images_per_part=images_per_part, streaming=streaming)
        for position in range(56, 128, 4):
            again.move_to(position)
            assert_same(batch(again, position, 4), expected[position])
    build = functools.partial(start, "several", state=json.loads(kept), images_per_part=images_per_part)
    for one in together(3, build, 56):
        assert_same(batch(one, 56, 4), expected[56])


def together(world_size, build, position):
    """Readers in threads, each its own process as far as they know, moved to `position`."""
    barrier, readers = threading.Barrier(world_size), [None] * world_size

    def process(rank):
        readers[rank] = build(rank=rank, world_size=world_size, wait=lambda: barrier.wait(60))
        readers[rank].move_to(position)

    threads = [threading.Thread(target=process, args=[rank]) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return readers


@pytest.mark.parametrize("images_per_part", [None, 48])
def test_several_processes_write_what_one_writes(images_per_part, start, tmp_path):
    start("one", images_per_part=images_per_part).move_to(0)
    for world_size in (2, 5):
        together(world_size, functools.partial(start, f"of {world_size}", images_per_part=images_per_part), 0)
        assert contents(tmp_path / f"of {world_size}") == contents(tmp_path / "one")


KILLED = """
import os, random, signal, sys, threading, time
from pathlib import Path
from teacher_cases import learned
from hf_flowdistill.data import images
from hf_flowdistill.data.image_dataset import open_dataset
from hf_flowdistill.teachers.encode import learn_image_encoder

data, columns, root = sys.argv[1], dict(zip(("image_column", "caption_column"), sys.argv[2:4])), Path(sys.argv[4])
images.ROWS_PER_SHARD = 8
encoder = learn_image_encoder(learned("sd3").pipeline, learned("sd3").contract)
dataset = open_dataset(data, **columns)

def start(name):
    pid = os.fork()
    if not pid:
        images.tqdm.set_lock(threading.RLock())  # the usual one is shared with the others
        images.ImagePairs(root / name, dataset, encoder, seed=0).move_to(0)
        os._exit(0)
    return pid

begin = time.perf_counter()
assert os.waitpid(start("whole"), 0)[1] == 0
longest, draw = time.perf_counter() - begin, random.Random(0)
for attempt in range(6):
    pid = start(f"killed-{attempt}")
    time.sleep(draw.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(len(list((root / f"killed-{attempt}").rglob("shard-*"))))
    assert os.waitpid(start(f"killed-{attempt}"), 0)[1] == 0
"""


def test_killed_while_it_encodes(sets, tmp_path):
    folder, columns = sets["parquet"]
    left = run_command("-c", KILLED, folder, *columns.values(), tmp_path).stdout.split()[-6:]
    whole = contents(tmp_path / "whole")
    assert len(whole) == 19 + 2 and any(0 < int(shards) < 19 for shards in left)
    for attempt in range(6):
        assert contents(tmp_path / f"killed-{attempt}") == whole


def test_damage_and_foreign_folders(start, tmp_path):
    start().move_to(0)
    victim = sorted((tmp_path / "cache").rglob("shard-*"))[1]
    data = victim.read_bytes()
    victim.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    with pytest.raises(UserError, match=f"the shard {victim} is corrupt .*: delete it"):
        start().move_to(0)
    victim.unlink()
    start().move_to(0)
    assert victim.read_bytes() == data
    for more, name in (
        ({"center_crop": False}, "crop, seed"),
        ({"images_per_part": 20}, "rows_per_shard, deleted_after_use"),
        ({"form": "webdataset"}, "data"),
    ):
        with pytest.raises(
            UserError, match=f"is from another VAE, size or data, which differs in {name}: give another"
        ):
            start(**more).move_to(0)


def test_what_is_somebody_elses_stays(start, tmp_path):
    """A folder that is no cache is refused as it is; in a cache only parts are deleted."""
    theirs = {"part-2024-photos/a.jpg": "a", ".tmp-notes": "b", "unfinished-novel.tmp": "c"}

    def put():
        for name, text in theirs.items():
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cache" / name).write_text(text)

    put()
    for _ in range(2):
        with pytest.raises(UserError, match=f"{tmp_path}/cache has files, .tmp-notes for one, but no index.json"):
            start(images_per_part=20).move_to(0)
        with pytest.raises(UserError, match="so it is no image cache: give a new or empty folder as --image_cache_di"):
            check_image_arguments(arguments("--adversarial", f"--image_cache_dir={tmp_path}/cache"))
        assert contents(tmp_path / "cache") == {name: text.encode() for name, text in theirs.items()}
    shutil.rmtree(tmp_path / "cache")
    pairs = start(images_per_part=20)
    pairs.move_to(0)
    put()
    first = pairs.folder
    pairs.move_to(40)
    there = contents(tmp_path / "cache")
    assert all(there[name] == text.encode() for name, text in theirs.items()) and not first.exists()


def test_a_folder_where_another_run_deletes(start, tmp_path):
    (tmp_path / "cache").mkdir()
    with FileLock(tmp_path / "cache/.lock"):
        with pytest.raises(UserError, match="another run uses the image cache .* give another --image_cache_dir"):
            start(images_per_part=20).move_to(0)
    start(images_per_part=20).move_to(0)


def test_a_disk_that_is_not_shared(start, monkeypatch):
    monkeypatch.setattr("hf_flowdistill.data.image_shards.write_shard", lambda *args, **kwargs: None)
    with pytest.raises(UserError, match="put it on a disk that all machines share"):
        start().move_to(0)


def test_nothing_but_broken_images(encoder, tmp_path):
    columns = write_image_set(tmp_path / "set", "webdataset", 5, set(range(5)))
    for images_per_part in (None, 2):
        dataset = open_dataset(str(tmp_path / "set"), streaming=True, **columns)
        pairs = ImagePairs(tmp_path / f"{images_per_part}", dataset, encoder, seed=0, images_per_part=images_per_part)
        with pytest.raises(UserError, match=r"no image of the dataset .* can be used \(row 0: it is of no known"):
            pairs.move_to(0)
    columns = {"image_column": "txt", "caption_column": "txt"}  # captions are no images
    pairs = ImagePairs(tmp_path / "texts", open_dataset(str(tmp_path / "set"), **columns), encoder, seed=0)
    with pytest.raises(UserError, match="row 0: it is missing"):
        pairs.move_to(0)


@pytest.mark.parametrize("several", [False, True])
def test_a_set_that_was_saved_to_the_disk(several, encoder, tmp_path):
    """The same pairs as from its files; its version is in its identity, and streaming makes no difference."""
    from datasets import Dataset, DatasetDict, Image

    def save(name, numbers):
        pictures = [{"bytes": image_bytes(number), "path": None} for number in numbers]
        rows = {"image": pictures, "text": [caption(number) for number in numbers]}
        saved = Dataset.from_dict(rows).cast_column("image", Image())
        (DatasetDict({"train": saved, "test": saved}) if several else saved).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    first, other = save("first", range(12)), save("other", range(1, 13))
    columns = write_image_set(tmp_path / "files", "parquet", 12)
    expected = ImagePairs(tmp_path / "a", open_dataset(str(tmp_path / "files"), **columns), encoder, seed=0)
    expected.move_to(0)
    for streaming in (False, True):
        pairs = ImagePairs(tmp_path / "b", open_dataset(first, streaming=streaming), encoder, seed=0)
        pairs.move_to(0)
        assert pairs.captions == expected.captions
        assert torch.equal(pairs.latents(range(12)), expected.latents(range(12)))
    assert open_dataset(first).identity == open_dataset(first).identity != open_dataset(other).identity
    if several:
        with pytest.raises(UserError, match="has no split validation, but train, test"):
            open_dataset(first, split="validation")


def test_sets_that_are_none_are_seen_in_their_first_rows(tmp_path):
    from datasets import Dataset, Features, Image, List, Value

    good, image, text = image_bytes(0), Image(), Value("string")

    def check(pictures, texts, image_type=image, text_type=text, **columns):
        features = Features({"image": image_type, "text": text_type})
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))} set"
        folder.mkdir()
        rows = Dataset.from_dict({"image": pictures, "text": texts}, features=features)
        rows.to_parquet(folder / "train.parquet")
        for streaming in (True, False):
            open_dataset(str(folder), streaming=streaming, **columns).check()

    def of(data):
        return {"bytes": data, "path": None}

    check([of(b"none"), None, of(good)], ["a", "b", "c"])  # one that can be used is enough
    check([of(b"none")] * 64 + [of(good)], ["a"] * 65)  # what is further on is not read
    for arguments, reason in (
        (([], []), "it is empty"),
        (([of(b"none"), of(good)], ["a", " "]), "row 0: it is of no known format"),
        (([3, 4] * 100, ["a"] * 200, Value("int64")), "row 0: it is no image but int"),
        (([[1.0]] * 100, ["a"] * 100, List(Value("float32"))), "row 0: it is no image but list"),
        (([of(good)] * 100, [7] * 100, image, Value("int32")), "row 0: its caption is no text but a int"),
    ):
        with pytest.raises(UserError, match=rf"no image of the dataset .*set can be used \({reason}\): choose"):
            check(*arguments)


def test_datasets_that_cannot_be_read(sets, tmp_path):
    with pytest.raises(UserError, match=f"the dataset {tmp_path}/nowhere cannot be read: "):
        open_dataset(str(tmp_path / "nowhere"))
    folder, columns = sets["parquet"]
    with pytest.raises(UserError, match="has no column image: choose --image_column among picture, llava, n"):
        open_dataset(folder, streaming=True)
    with pytest.raises(UserError, match="has no column text: choose --caption_column among"):
        open_dataset(folder, image_column="picture")
    with pytest.raises(UserError, match="cannot be read: "):
        open_dataset(folder, split="test", **columns)


def test_captions_that_are_none(encoder, tmp_path):
    from datasets import Dataset

    values = ["a", None, " ", "b\n"]
    Dataset.from_dict({"image": [picture(0)] * 4, "text": values}).to_parquet(tmp_path / "train.parquet")
    pairs = ImagePairs(tmp_path / "cache", open_dataset(str(tmp_path)), encoder, seed=0)
    pairs.move_to(0)
    assert pairs.captions == ["a", "b"]
    skipped = [json.loads(line) for line in (tmp_path / "cache/skipped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in skipped] == [(1, "it has no caption"), (2, "it has no caption")]


def test_images_are_fitted_as_diffusers_scripts_do():
    """The shorter side to the resolution, then a crop: as torchvision's Resize and CenterCrop do in its examples."""
    image = picture(0).resize((96, 64), Image.Resampling.BICUBIC)
    fitted = fit_image(image, 32, 32, center_crop=True, random_flip=False, seed=0)
    reference = image.resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32))
    assert np.abs(np.asarray(fitted, int) - np.asarray(reference, int)).max() <= 1

    wide = fit_image(image, 20, 40, center_crop=True, random_flip=False, seed=0)
    assert wide.size == (40, 20)
    drawn = [fit_image(image, 32, 32, center_crop=False, random_flip=True, seed=seed) for seed in range(40)]
    assert len({one.tobytes() for one in drawn}) == 40
    again = fit_image(image, 32, 32, center_crop=False, random_flip=True, seed=7)
    assert again.tobytes() == drawn[7].tobytes()
    flipped = [fit_image(image, 32, 32, center_crop=True, random_flip=True, seed=seed) for seed in range(40)]
    mirrored = fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert {one.tobytes() for one in flipped} == {fitted.tobytes(), mirrored}
    assert 10 < sum(one.tobytes() == mirrored for one in flipped) < 30
    assert len({row_seed(seed, row) for seed in (0, 1) for row in range(50)}) == 100


def test_opening_images(tmp_path):
    image = picture(2)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.resize((30, 20)).save(file, "PNG", exif=exif)
    assert open_image({"bytes": file.getvalue(), "path": None}).size == (20, 30)
    path = tmp_path / "grey.png"
    image.convert("LA").save(path)
    grey = np.asarray(image.convert("L"))
    for value in (str(path), path.read_bytes(), {"bytes": None, "path": str(path)}, image.convert("LA")):
        opened = open_image(value)
        assert opened.mode == "RGB" and (np.asarray(opened)[..., 1] == grey).all()
    for value, reason in (
        (None, "it is missing"),
        ({"bytes": None, "path": None}, "it is missing"),
        (str(tmp_path / "gone.png"), "it is missing"),
        (str(tmp_path), "Is a directory"),
        (path.read_bytes()[:60], "."),
        (3, "it is no image but int"),
    ):
        with pytest.raises(UnusableImage, match=reason):
            open_image(value)


class Answer(Exception):
    def __init__(self, status):
        super().__init__(f"{status}, message='Forbidden'")
        self.status = status


def test_addresses_of_images(monkeypatch):
    """One that cannot be meant or is refused is skipped, one that does not answer after three tries."""
    monkeypatch.setattr("hf_flowdistill.data.image_dataset.SECONDS_BETWEEN_TRIES", (0, 0))
    for path, reason in (("nowhere://a.jpg", "Protocol not known"), ("a\0.jpg", "null byte")):
        with pytest.raises(UnusableImage, match=reason):
            open_image(path)
    tries, file = [], io.BytesIO()
    picture(2).save(file, "PNG")

    def answers(*errors):
        def get(path, mode):
            tries.append(path)
            if len(tries) <= len(errors):
                raise errors[len(tries) - 1]
            return io.BytesIO(file.getvalue())

        tries.clear()
        monkeypatch.setattr("fsspec.open", get)

    for error, count in (
        (Answer(403), 1),
        (Answer(429), 3),
        (Answer(500), 3),
        (ConnectionError("no such host"), 3),
        (TimeoutError(), 3),
    ):
        answers(*3 * [error])
        with pytest.raises(UnusableImage, match=str(error) or "TimeoutError"):
            open_image({"bytes": None, "path": "https://example.com/a.jpg"})
        assert len(tries) == count
    answers(Answer(503), ConnectionError("reset"))
    assert open_image("https://example.com/a.jpg").size == picture(2).size and len(tries) == 3
    answers(ImportError('HTTPFileSystem requires "aiohttp" to be installed'))
    with pytest.raises(UserError, match='needs a library that is not installed here .*"aiohttp" .*: install it'):
        open_image("https://example.com/a.jpg")


def test_a_dataset_is_known_by_the_files_of_all_its_splits(tmp_path):
    from datasets import Dataset

    def write(split, *captions):
        rows = {"image": [picture(0)] * len(captions), "text": list(captions)}
        Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}-0.parquet")

    def identity(split):
        return open_dataset(str(tmp_path), split=split, streaming="[" not in split).identity

    splits = ("train", "validation", "train+validation", "train[:1]+validation[:1]")
    write("train", "a", "b")
    write("validation", "c")
    before = {split: identity(split) for split in splits}
    assert len({identity["files"] for identity in before.values()}) == 3
    write("validation", "another")
    assert [split for split in splits if identity(split) != before[split]] == list(splits[1:])


def arguments(*words):
    parser = ArgumentParser()
    add_image_arguments(parser)
    rest = {
        "adversarial": "--adversarial" in words,
        "dataset_name": "data",
        "dataset_config_name": None,
        "caption_column": "text",
        "train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "output_dir": "out",
        "seed": 3,
    }
    return parser.parse_args([word for word in words if word != "--adversarial"], SimpleNamespace(**rest))


def test_arguments():
    check_image_arguments(arguments())
    args = arguments("--adversarial", "--streaming", "--images_per_part=8", "--image_column=jpg", "--dataset_split=a")
    check_image_arguments(args)
    assert str(image_cache_dir(args)) == "out/images"
    assert dataset_settings(args) == {
        "config": None,
        "split": "a",
        "image_column": "jpg",
        "caption_column": "text",
        "streaming": True,
    }
    assert pair_settings(args) == {"seed": 3, "images_per_part": 8, "center_crop": False, "random_flip": False}
    for words, message in (
        (["--random_flip"], "--random_flip is of the images of --adversarial"),
        (["--image_cache_dir=x"], "--image_cache_dir is of the images of --adversarial"),
        (["--adversarial", f"--image_cache_dir={__file__}"], "--image_cache_dir .* cannot be a folder"),
    ):
        with pytest.raises(UserError, match=message):
            check_image_arguments(arguments(*words))
    args = arguments("--adversarial")
    args.dataset_name = None
    with pytest.raises(UserError, match="name a text-image set with --dataset_name"):
        check_image_arguments(args)


def test_a_part_is_an_update_of_all_processes():
    args = arguments("--adversarial", "--images_per_part=24")
    check_parts(args, 24, 3)
    with pytest.raises(UserError, match="is 24: it must be .*, which are 32 of 4 processes"):
        check_parts(args, 32, 4)
    check_parts(arguments("--adversarial"), 32, 4)


def test_memory_does_not_grow_with_the_data(tmp_path):
    """The benchmark, shortened. From the second part to the last, the JPEG files that are read are 9 MB, the pictures
    37 MB: a reader that kept either would be seen."""
    command = [ROOT / "benchmarks/images.py", "--forms", "webdataset", "--images", 1000, "--images_per_part", 125]
    run_command(*command, "--output_file", tmp_path / "images.json")
    (result,) = json.loads((tmp_path / "images.json").read_text())
    assert result["usable"] == 990 and result["skipped"] == 10 and result["resumes_exactly"] is True
    memory = result["resident_megabytes_by_part"]
    assert len(memory) >= 7 and result["megabytes"] > 12 and max(memory[2:]) - memory[1] < 5
