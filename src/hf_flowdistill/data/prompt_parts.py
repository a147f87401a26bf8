# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Prompts of a dataset as they are needed: a part at a time, from a stream of its captions, kept on the disk.

The images of a training that count from `number * prompts_per_part` on have the prompts of part `number`. Where the
dataset ends, a part goes on with its beginning, so that all have equally many.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from hf_flowdistill.data.files import delete_other_parts, part_folder, replace_text
from hf_flowdistill.data.prompts import captions_of, open_captions
from hf_flowdistill.errors import UserError, first_line


logger = logging.getLogger(__name__)

PROMPTS_FILE = "prompts.json"


class PromptParts:
    """The prompts of the current part.

    On the disk, `root` has a folder for it, with prompts.json: the prompts, and where the stream is after them.

    Attributes:
        captions: the prompts of the current part.
        folder: of the current part, deleted with it; their conditioning can be kept inside.
        identity: of the dataset, as JSON.
    """

    def __init__(
        self,
        root,
        name: str,
        config: str | None,
        caption_column: str,
        *,
        prompts_per_part: int,
        is_main: bool = True,
        wait: Callable[[], None] = lambda: None,
    ):
        """Nothing is read yet; `move_to` comes first.

        Args:
            root: a folder on a disk that all processes share.
            name, config, caption_column: as for `data.prompts.read_dataset`.
            is_main: whether this is the process that reads the dataset.
            wait: returns when all processes have called it.
        """
        self.captions: list[str] = []
        self.identity = [name, config, caption_column]
        self._root, self._prompts_per_part, self._number = Path(root), prompts_per_part, None
        self._is_main, self._wait = is_main, wait

    @property
    def folder(self) -> Path:
        return self._folder(self._number)

    def is_over(self, position: int) -> bool:
        """Whether the image at `position` has the prompts of another part than the current one."""
        return position // self._prompts_per_part != self._number

    def move_to(self, position: int) -> None:
        """Make the part of the image at `position` the current one; every process calls this. Others are deleted.

        Raises:
            UserError: the dataset cannot be read, or has no prompt.
        """
        number = position // self._prompts_per_part
        if self._is_main:
            self._make(number)
        self._wait()
        self._number = number
        kept = _read(self.folder)
        if kept is None:
            raise UserError(f"{self.folder} was not written: --output_dir must be a folder that all processes share.")
        self.captions = kept["prompts"]
        if self._is_main:
            delete_other_parts(self.folder)

    def _folder(self, number: int) -> Path:
        return part_folder(self._root, number)

    def _make(self, number: int) -> None:
        """Read the part from the stream, after the last one before it that is on the disk."""
        if (kept := _read(self._folder(number))) is not None:
            logger.info(f"{len(kept['prompts'])} prompts are read from {self._folder(number)}")
            return
        first = number
        while first and (kept := _read(self._folder(first - 1))) is None:
            first -= 1
        state = kept["state"] if first else None
        for _ in range(first, number + 1):
            prompts, state = read_part(*self.identity, self._prompts_per_part, state)
        folder = self._folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / PROMPTS_FILE, json.dumps({"prompts": prompts, "state": state}))
        logger.info(f"{len(prompts)} prompts are read from the dataset {self.identity[0]}")


def read_part(
    name: str, config: str | None, caption_column: str, count: int, state: dict | None
) -> tuple[list[str], dict]:
    """The next `count` prompts of a dataset, and where its stream is then; `state` is where it was, or None."""
    prompts: list[str] = []
    try:
        while True:
            rows = open_captions(name, config, caption_column)
            if state is not None:
                rows.load_state_dict(state)
            before = len(prompts)
            for prompt in captions_of(f"the dataset {name}", rows, caption_column):
                prompts.append(prompt)
                if len(prompts) == count:
                    return prompts, rows.state_dict()
            if state is None and len(prompts) == before:
                raise UserError(f"the dataset {name} holds no prompt in its column {caption_column}.")
            state = None  # from its beginning
    except UserError:
        raise
    except Exception as error:  # of the many kinds that files, archives and the Hub have
        raise UserError(f"the dataset {name} cannot be read: {first_line(error)}") from error


def _read(folder: Path) -> dict | None:
    try:
        return json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
