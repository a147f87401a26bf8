# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Mistakes a user can make, told in one sentence."""

import functools
import sys


DISK_FULL = "No space left on device", "Disk quota exceeded", "File too large"  # of which errors have many types


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
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except Exception as error:
            if not any(words in str(error) for words in DISK_FULL):
                raise
            print(f"error: {first_line(error)}: free some space and start again.", file=sys.stderr)
            sys.exit(1)

    return wrapped
