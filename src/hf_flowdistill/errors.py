# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Mistakes a user can make, told in one sentence."""

import functools
import json
import os
import sys
import time
from pathlib import Path


DISK_FULL = "No space left on device", "Disk quota exceeded", "File too large"  # of which errors have many types
PATIENCE = 5  # seconds


class UserError(ValueError):
    """A mistake in the input. The message is one sentence: what is wrong and what to do about it."""


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to be part of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def exit_on_user_error(main):
    """Wrap a script's `main`: a `UserError` becomes one line on stderr and exit code 2, a full disk one and code 1."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            _tell(f"error: {error}")
            sys.exit(2)
        except Exception as error:
            if not any(words in str(error) for words in DISK_FULL):
                raise
            _tell(f"error: {first_line(error)}: free some space and start again.")
            sys.exit(1)

    return wrapped


def _tell(sentence: str) -> None:
    """Say on stderr why this process ends, and to torchrun, whose report at its own end then has it too.

    Of several processes on a machine, which mostly end for one reason, the first says it. The others wait: their
    launcher ends them meanwhile, unless they are the only ones to fail.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(PATIENCE)
    print(sentence, file=sys.stderr, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")
