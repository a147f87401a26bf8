# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The student's way to the Hub. A push that fails never takes a finished training down with it."""

import shlex
import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_flowdistill.errors import UserError, first_line


NOT_PUBLISHED = ["*.tmp/**", "checkpoint-*/**", "**/__pycache__/**"]


def check_push(repo_id, *, token=None) -> str:
    """The full id (organisation/name) that `repo_id` means, after asking the Hub who we are: before a long work.

    Raises:
        UserError: if the id is not one, if there is no valid token, or if the Hub cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(f"{repo_id!r} is no repository id: give name or organisation/name.") from None
    try:
        user = HfApi(token=token).whoami()["name"]
    except Exception as error:  # The client raises errors of several libraries: no token, bad token, no network.
        raise UserError(
            f"the Hub does not let us in, so nothing could be pushed ({_reason(error, token)}): log in with "
            "`hf auth login`, or leave out --push_to_hub."
        ) from None
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def push_student(folder, repo_id, *, token=None, private=False, commit_message="Upload student") -> str | None:
    """Upload `folder` to the model repository `repo_id`, which is created if it is not there.

    Returns:
        The address of the repository. None if the push failed: the reason and the command to run again are then on
        stderr, and nothing is raised. The token is in neither.
    """
    try:
        if not Path(folder, "model_index.json").is_file():
            raise FileNotFoundError(f"{folder} holds no exported student")
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        # An existing repository keeps its visibility, whatever `create_repo` was told.
        if private and not api.model_info(repo_id).private:
            raise PermissionError(f"{repo_id} exists and is public, while a private repository was asked for")
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, ignore_patterns=NOT_PUBLISHED
        )
    except Exception as error:  # See above: the training before this must end well whatever happens here.
        command = ["hf", "upload", repo_id, str(Path(folder).absolute()), ".", *(["--private"] if private else [])]
        print(
            f"The student was not pushed to {repo_id}: {_reason(error, token)}\n"
            f"It is complete in {folder}. To push it later: {shlex.join(command)}",
            file=sys.stderr,
        )
        return None
    return str(url)


def _reason(error, token) -> str:
    """The first line of an error, without the token."""
    text = first_line(error)
    return text.replace(token, "[removed]") if token else text
