# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import csv
import json
import sys

import pytest

from hf_flowdistill.data.prompt_parts import PromptParts
from hf_flowdistill.data.prompts import read_dataset, read_prompts
from hf_flowdistill.data.stream import PromptStream
from hf_flowdistill.errors import UserError


PROMPTS = ["red", "blue", "red", "green", "white"]


def test_reading(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a café\n\n  red circle \r\na café\n", encoding="utf-8")
    assert read_prompts(path) == ["a café", "red circle", "a café"]
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(path)
    path.write_text(" \n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(path)
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path)


ROWS = [{"id": 1, "caption": " a café\n"}, {"id": 2, "caption": 'a "red", round\ncircle'}, {"id": 3, "caption": ""}]
CAPTIONS = ["a café", 'a "red", round\ncircle']


def write_jsonl(path, rows=ROWS):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def write_csv(path, rows=ROWS):
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["id", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("write", [write_jsonl, write_csv], ids=["jsonl", "csv"])
def test_files_with_columns(write, tmp_path):
    path = write(tmp_path / f"prompts.{write.__name__.removeprefix('write_')}")
    assert read_prompts(path, "caption") == CAPTIONS
    with pytest.raises(
        UserError, match="row 1 of the prompt file .* has no column text: choose --caption_column among id"
    ):
        read_prompts(path)
    write(path, [{"id": 1, "caption": " "}])
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(path, "caption")


def test_files_that_cannot_be_read(tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"text": "a"}, {"text": ["b"]}])
    with pytest.raises(UserError, match="has a list for text in row 2: the prompts must be text"):
        read_prompts(path)
    for broken in ('{"text": "a"}\n{"text": \n', '{"text": "a"}\n["b"]\n'):
        path.write_text(broken)
        with pytest.raises(UserError, match="cannot be read: line 2 is not a JSON object"):
            read_prompts(path)
    path.write_text('{"text": "\\ud83d"}')
    with pytest.raises(UserError, match="cannot be read: .*surrogates not allowed"):
        read_prompts(path)
    path = tmp_path / "prompts.txt"
    path.write_text("a")
    with pytest.raises(UserError, match="has no columns, it is read line by line: leave out --caption_column"):
        read_prompts(path, "caption")
    path = tmp_path / "prompts.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is none of .txt, .jsonl and .csv: give one, or use --dataset_name"):
        read_prompts(path)
    path = tmp_path / "prompts.csv"
    path.write_text("id,text\n1,a\n2\n")  # a short line
    assert read_prompts(path) == ["a"]


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_dataset_in_a_folder(kind, tmp_path, no_network):
    """The images of the parquet file are none: they are not to be decoded."""
    from datasets import Dataset, Image

    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "parquet":
        rows = [{**row, "image": {"bytes": b"no image", "path": None}} for row in ROWS]
        Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / "train-0.parquet")
    else:
        globals()[f"write_{kind}"](folder / f"train.{kind}")
    assert read_dataset(str(folder), caption_column="caption") == CAPTIONS
    with pytest.raises(UserError, match="has no column text: choose --caption_column among id, caption"):
        read_dataset(str(folder))


@pytest.mark.parametrize("several", [False, True])
def test_a_dataset_that_was_saved_to_the_disk(several, tmp_path, no_network):
    from datasets import Dataset, DatasetDict, Image

    rows = [{**row, "image": {"bytes": b"no image", "path": None}} for row in ROWS]
    saved = Dataset.from_list(rows).cast_column("image", Image())
    (DatasetDict({"train": saved, "test": saved.select([0])}) if several else saved).save_to_disk(tmp_path / "data")
    assert read_dataset(str(tmp_path / "data"), caption_column="caption") == CAPTIONS
    with pytest.raises(UserError, match="has no column text: choose --caption_column among"):
        read_dataset(str(tmp_path / "data"))
    with pytest.raises(UserError, match="saved to the disk without configurations: leave out --dataset_config_name"):
        read_dataset(str(tmp_path / "data"), "en", caption_column="caption")
    DatasetDict({"test": saved}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="other has no split train, but test"):
        read_dataset(str(tmp_path / "other"), caption_column="caption")


def test_datasets_that_cannot_be_read(tmp_path, no_network, monkeypatch):
    with pytest.raises(UserError, match=f"the dataset {tmp_path}/nowhere cannot be read: ") as error:
        read_dataset(f"{tmp_path}/nowhere")
    assert "\n" not in str(error.value)
    (tmp_path / "train.csv").write_text("text\n\n")
    with pytest.raises(UserError, match="holds no prompt in its column text: choose one with --caption_column"):
        read_dataset(str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the datasets library: `pip install datasets`"):
        read_dataset(str(tmp_path))


def test_every_pass_uses_every_line_once():
    stream = PromptStream(PROMPTS, seed=0)
    assert [stream.distinct[row] for row in stream.row_of] == PROMPTS
    assert stream.distinct == ["red", "blue", "green", "white"] and stream.count == 5
    drawn = [stream.distinct[row] for row in stream.rows("generator", range(50))]
    passes = [drawn[start : start + 5] for start in range(0, 50, 5)]
    assert all(sorted(one) == sorted(PROMPTS) for one in passes)
    assert len({tuple(one) for one in passes}) > 5


def test_position_is_all_there_is():
    whole = PromptStream(PROMPTS, seed=0).rows("generator", range(23))
    assert whole[17:].tolist() == PromptStream(PROMPTS, seed=0).rows("generator", range(17, 23)).tolist()
    for seed, purpose in ((1, "generator"), (0, "fake_score")):
        assert whole.tolist() != PromptStream(PROMPTS, seed).rows(purpose, range(23)).tolist()


def test_of_parquet_files_nothing_but_the_captions_is_read(tmp_path, no_network):
    """What lies where the images are stored is no image."""
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table({"text": CAPTIONS, "image": [b"picture"] * len(CAPTIONS)}), file)
    column = parquet.ParquetFile(file).metadata.row_group(0).column(1)
    content, start = bytearray(file.read_bytes()), column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"x" * column.total_compressed_size
    file.write_bytes(content)
    assert read_dataset(str(tmp_path)) == CAPTIONS


def test_parts_follow_each_other_and_begin_again(tmp_path, no_network):
    """The same prompts whatever part a run starts at, and from wherever the stream is known to be."""
    from datasets import Dataset

    (tmp_path / "set").mkdir()
    numbers = [f"prompt {number}" for number in range(25)]
    for file in range(3):
        rows = numbers[10 * file : 10 * file + 10]
        Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "set" / f"train-{file}.parquet")

    def parts(root):
        return PromptParts(tmp_path / root, str(tmp_path / "set"), None, "text", prompts_per_part=8)

    one = parts("one")
    for position in (0, 8, 16, 24, 40):
        assert one.is_over(position)
        one.move_to(position)
        first = 8 * (position // 8)
        assert one.captions == [numbers[(first + i) % 25] for i in range(8)]
        assert not one.is_over(first + 7) and one.is_over(first + 8)
        assert [path.name for path in (tmp_path / "one").iterdir()] == [f"part-{position // 8:010}"]
    late = parts("late")
    late.move_to(40)
    assert late.captions == one.captions
    (tmp_path / "set" / "train-0.parquet").unlink()  # what is on the disk is not asked for again
    again = parts("one")
    again.move_to(40)
    assert again.captions == one.captions
    with pytest.raises(UserError, match="has no column caption: choose --caption_column among text"):
        PromptParts(tmp_path / "none", str(tmp_path / "set"), None, "caption", prompts_per_part=8).move_to(0)
