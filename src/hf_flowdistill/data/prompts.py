# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Prompt files, and which prompt each training sample uses."""

import csv
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from hf_flowdistill.data.saved_datasets import is_saved, read_saved
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.flow.draws import permutation


CAPTION_COLUMN = "text"


def read_prompts(path, caption_column: str = CAPTION_COLUMN) -> list[str]:
    """The prompts of a UTF-8 file, stripped, in file order; blank ones are left out, repeated ones stay repeated.

    `.jsonl` has one JSON object per line and `.csv` a line of column names, both with the prompt in `caption_column`.
    Any other file has one prompt per line.

    Raises:
        UserError: if the file is missing, unreadable, has no such column, or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the prompt file {path} does not exist: give a text file with one prompt per line.")
    if path.suffix in (".json", ".parquet", ".arrow", ".tsv"):
        raise UserError(f"the prompt file {path} is none of .txt, .jsonl and .csv: give one, or use --dataset_name.")
    what = f"the prompt file {path}"
    rows_of = {".jsonl": _jsonl_rows, ".csv": csv.DictReader}.get(path.suffix, _text_rows)
    if rows_of is _text_rows and caption_column != CAPTION_COLUMN:
        raise UserError(f"{what} has no columns, it is read line by line: leave out --caption_column.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            prompts = _captions(what, rows_of(file), caption_column)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{what} is not UTF-8 text: save it as such, one prompt per line.") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{what} cannot be read: {first_line(error)}.") from None
    if not prompts:
        raise UserError(f"{what} holds no prompt: write one prompt per line.")
    return prompts


def read_dataset(name: str, config: str | None = None, caption_column: str = CAPTION_COLUMN) -> list[str]:
    """The prompts of the "train" split of a dataset, from a folder or from the Hub, as `read_prompts` gives them.

    It is streamed, or read from where `save_to_disk` put it: nothing but the captions is kept, and images beside them
    are not decoded.

    Raises:
        UserError: if the dataset cannot be read, has no such column, or holds no prompt.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("--dataset_name needs the datasets library: `pip install datasets`.") from None
    what = f"the dataset {name}"
    try:
        if is_saved(name):
            rows = read_saved(name, config, "train")
        else:
            rows = load_dataset(name, config, split="train", streaming=True)
        if rows.column_names:  # not known of every format before the first row
            _check_column(what, rows.column_names, caption_column)
            rows = rows.select_columns([caption_column])
        prompts = _captions(what, rows, caption_column)
    except UserError:
        raise
    except Exception as error:  # of the many kinds that files, archives and the Hub have
        raise UserError(f"{what} cannot be read: {first_line(error)}") from error
    if not prompts:
        raise UserError(f"{what} holds no prompt in its column {caption_column}: choose one with --caption_column.")
    return prompts


def _text_rows(lines: Iterable[str]) -> Iterator[dict]:
    return ({CAPTION_COLUMN: part} for line in lines for part in line.splitlines())


def _jsonl_rows(lines: Iterable[str]) -> Iterator[dict]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            yield row


def _check_column(what: str, columns: Iterable[str], column: str) -> None:
    if column not in columns:
        raise UserError(
            f"{what} has no column {column}: choose --caption_column among {', '.join(map(str, columns))}."
        )


def _captions(what: str, rows: Iterable[dict], column: str) -> list[str]:
    """The captions that are not blank, without the white space around them."""
    captions = []
    for number, row in enumerate(rows, start=1):
        _check_column(f"row {number} of {what}", row, column)
        caption = row[column]
        if caption is not None and not isinstance(caption, str):
            kind = type(caption).__name__
            raise UserError(f"{what} has a {kind} for {column} in row {number}: the prompts must be text.")
        captions.append((caption or "").strip())
        captions[-1].encode()  # half of a surrogate pair, which JSON can hold, is an error here and not in a tokenizer
    return list(filter(None, captions))


class PromptStream:
    """A fresh seeded permutation of the prompts for every pass over them.

    The prompt of a sample depends only on the number of images before it, so there is no state to save: resuming is
    going on at the same position.

    Attributes:
        distinct: every prompt once, in order of first appearance.
        count: how many prompts there are in one pass, repetitions included.
        row_of: the row in `distinct` of each prompt, [count].
    """

    def __init__(self, prompts: list[str], seed: int):
        self.distinct = list(dict.fromkeys(prompts))
        self.count = len(prompts)
        self.seed = seed
        row_of = {prompt: row for row, prompt in enumerate(self.distinct)}
        self.row_of = torch.tensor([row_of[prompt] for prompt in prompts])
        self._pass = functools.lru_cache(maxsize=4)(self._draw_pass)

    def rows(self, purpose: str, positions) -> torch.Tensor:
        """Rows in `distinct` of the samples at `positions`, [len(positions)]; each `purpose` has its own order."""
        picked = [self._pass(purpose, position // self.count)[position % self.count] for position in positions]
        return torch.stack(picked)

    def _draw_pass(self, purpose: str, number: int) -> torch.Tensor:
        return self.row_of[permutation(self.count, self.seed, purpose, number)]
