# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A student's repository, downloaded and compared byte by byte with what the Hub says of it."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.checksums import PICKLES, compare, files_of, tree_of, without_weights
from hf_flowdistill.hub.client_errors import persistently, reason


@dataclass(frozen=True)
class Verified:
    """Where the `files` (a number) of a repository are, at which `commit`; each has the content the Hub has."""

    folder: Path
    commit: str
    files: int


def verify_repository(repo_id, *, revision=None, cache_dir=None, local_dir=None, token=None) -> Verified:
    """Download a model repository, if it is not there yet, and compare every file with the Hub's checksum.

    A download of the right length with a wrong byte is accepted by the client and stays in its cache.

    Args:
        repo_id: organisation/name.
        local_dir: a folder to compare instead; nothing is downloaded then.

    Raises:
        UserError: if a file is missing or different, if the repository has its weights as pickles only, if it cannot
            be seen, or if the Hub does not answer: a copy in the cache is then no answer.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(f"{repo_id!r} is no repository id: give organisation/name.") from None
    api = HfApi(token=token)
    try:
        commit = persistently(api.model_info, repo_id, revision=revision).sha
        tree = persistently(tree_of, api, repo_id, commit)
        if without_weights(tree):
            raise UserError(
                f"{repo_id} has its weights as pickles only, which can run any code when they are loaded: ask its "
                "authors for safetensors."
            )
        wanted = {name: entry for name, entry in tree.items() if not name.endswith(PICKLES)}
        folder = Path(local_dir) if local_dir else persistently(_download, repo_id, commit, cache_dir, token)
    except UserError:
        raise
    except Exception as error:  # Of the client, of two HTTP libraries, of the operating system.
        raise UserError(f"{repo_id} cannot be compared with the Hub: {reason(error, token)}.") from error

    there = compare({name: file for name, file in files_of(folder).items() if name in wanted}, wanted)
    if there.different or there.extra:  # extra: on the Hub alone
        told = [f"{name} is not what the Hub has" for name in there.different]
        told += [f"{name} is missing" for name in there.extra]
        again = "hf download {} {} --revision {} --force-download"
        advice = again.format(repo_id, " ".join(there.different + there.extra), commit)
        raise UserError(f"{'; '.join(told)} in {folder}: download again with `{advice}`.")
    return Verified(folder, commit, len(wanted))


def _download(repo_id, commit, cache_dir, token) -> Path:
    ignored = [f"*{ending}" for ending in PICKLES]
    return Path(snapshot_download(repo_id, revision=commit, cache_dir=cache_dir, token=token, ignore_patterns=ignored))
