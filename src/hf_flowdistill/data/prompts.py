# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Prompts of files and datasets."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf_flowdistill.data.saved_datasets import is_saved, read_saved
from hf_flowdistill.errors import UserError, first_line


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
            prompts = list(captions_of(what, rows_of(file), caption_column))
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
    what = f"the dataset {name}"
    try:
        prompts = list(captions_of(what, open_captions(name, config, caption_column), caption_column))
    except UserError:
        raise
    except Exception as error:  # of the many kinds that files, archives and the Hub have
        raise UserError(f"{what} cannot be read: {first_line(error)}") from error
    if not prompts:
        raise UserError(f"{what} holds no prompt in its column {caption_column}: choose one with --caption_column.")
    return prompts


def open_captions(name: str, config: str | None, caption_column: str):
    """The rows of the "train" split of a dataset, from a folder or from the Hub, as a stream of their captions alone:
    of parquet files nothing else is fetched.

    Raises:
        UserError: if there is no such column.
        Exception: of many kinds, if the dataset cannot be read.
    """
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise UserError("--dataset_name needs the datasets library: `pip install datasets`.") from None
    builder = None if is_saved(name) else load_dataset_builder(name, config)
    if builder is None:
        rows = read_saved(name, config, "train").to_iterable_dataset()
    else:
        rows = builder.as_streaming_dataset(split="train")
    if not rows.column_names:  # not known of every format before the first row
        return rows
    _check_column(f"the dataset {name}", rows.column_names, caption_column)
    if hasattr(getattr(builder, "config", None), "columns"):
        builder.config.columns = [caption_column]
        rows = builder.as_streaming_dataset(split="train")
    return rows.select_columns([caption_column])


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


def captions_of(what: str, rows: Iterable[dict], column: str) -> Iterator[str]:
    """The captions that are not blank, without the white space around them."""
    for number, row in enumerate(rows, start=1):
        _check_column(f"row {number} of {what}", row, column)
        caption = row[column]
        if caption is not None and not isinstance(caption, str):
            kind = type(caption).__name__
            raise UserError(f"{what} has a {kind} for {column} in row {number}: the prompts must be text.")
        caption = (caption or "").strip()
        caption.encode()  # half of a surrogate pair, which JSON can hold, is an error here and not in a tokenizer
        if caption:
            yield caption
