# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Folders that `save_to_disk` of the datasets library wrote, which its `load_dataset` does not read."""

from pathlib import Path

from hf_flowdistill.errors import UserError


def is_saved(name: str) -> bool:
    """Whether `name` is such a folder, of one split or of several."""
    folder = Path(name)
    one = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def read_saved(name: str, config: str | None, split: str):
    """The rows of a split of such a folder, a `datasets.Dataset`; of one split alone, whatever it is called.

    Raises:
        UserError: a configuration is asked for, or a split that is not there.
    """
    import datasets

    if config is not None:
        raise UserError(f"{name} was saved to the disk without configurations: leave out --dataset_config_name.")
    rows = datasets.load_from_disk(name)
    if not isinstance(rows, datasets.DatasetDict):
        return rows
    if split not in rows:
        raise UserError(f"the dataset {name} has no split {split}, but {', '.join(rows)}.")
    return rows[split]
