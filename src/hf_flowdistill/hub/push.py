# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The student's way to the Hub: one commit on the head that was seen, and after every error a look at what is there.

A push that fails never takes a finished training down with it.
"""

import re
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.checksums import compare, files_of, tree_of, without_weights
from hf_flowdistill.hub.client_errors import WAITS, is_passing, pause, persistently, reason
from hf_flowdistill.hub.secrets import files_with_secrets, known_tokens
from hf_flowdistill.hub.settings import read_settings


INDEX = "model_index.json"
PULL_REQUESTS = 10  # of the newest, how many are looked at for one that holds these files already


@dataclass(frozen=True)
class Pushed:
    """`url` of the repository or of the pull request, `commit` that holds the files, how many files were `changed`."""

    url: str
    commit: str
    changed: int


def check_push(repo_id, *, token=None) -> str:
    """The full id (organisation/name) that `repo_id` means, after asking the Hub who we are: before a long work.

    Raises:
        UserError: if the id is not one, if there is no valid token or one that can only read, or if the Hub cannot be
            reached.
    """
    _check_id(repo_id)
    try:
        me = persistently(HfApi(token=token).whoami)
    except Exception as error:  # The client raises errors of several libraries: no token, bad token, no network.
        raise UserError(
            f"the Hub does not let us in, so nothing could be pushed ({reason(error, token)}): log in with "
            "`hf auth login`, or leave out --push_to_hub."
        ) from None
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("the token can only read, so nothing could be pushed: make one that can write.")
    return repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"


def push_student(folder, repo_id, *, token=None, private=False) -> str | None:
    """`upload_student` at the end of a training: whatever goes wrong is told on stderr, and nothing is raised.

    Returns:
        The address of the repository. None if the push failed: the reason and the command to run again are then on
        stderr. The token is in neither.
    """
    try:
        return upload_student(folder, repo_id, token=token, private=private).url
    except Exception as error:
        told = str(error) if isinstance(error, UserError) else reason(error, token)
        command = ["flowdistill", "push", str(Path(folder).absolute()), "--repo_id", repo_id]
        print(
            f"The student was not pushed to {repo_id}: {told}\n"
            f"It is complete in {folder}. To push it later: {shlex.join([*command, *['--private'] * private])}",
            file=sys.stderr,
        )
        return None


def upload_student(
    folder, repo_id, *, token=None, private=False, revision=None, create_pr=False, commit_message="Upload student"
) -> Pushed:
    """Make the model repository `repo_id` hold the files of `folder`, by one commit or, if it does already, by none.

    The repository and the branch are made if they are not there. Files of an earlier student that this one does not
    have are deleted, others in the repository are left. Large files go by LFS or xet, as the client chooses.

    Args:
        folder: of an exported student.
        private: create the repository as private; refuse to push to one that is public.
        revision: branch to commit to; "main" by default.
        create_pr: open a pull request against "main" instead.

    Raises:
        UserError: if this is no student, if a token is in one of its files, or if the Hub does not hold it at the end.
            The Hub has then been asked what it holds, and the message says so.
    """
    _check_id(repo_id)
    files = _publishable(folder, token)
    api = HfApi(token=token)
    push = _Push(api, repo_id, files, revision or "main", create_pr, commit_message)
    try:
        push.prepare(private)
        return push.found() or push.commit()
    except UserError:
        raise
    except Exception as error:  # Of the client, of two HTTP libraries, of the operating system.
        raise UserError(f"{reason(error, token)}; {push.what_is_there()}") from error


def _check_id(repo_id):
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(f"{repo_id!r} is no repository id: give name or organisation/name.") from None


def _publishable(folder, token) -> dict[str, Path]:
    """The files to push."""
    if not Path(folder).is_dir() or read_settings(folder) is None:
        raise UserError(f"{folder} holds no exported student: give the folder that the training or the export wrote.")
    files = files_of(folder)
    if not any(name.endswith(".safetensors") for name in files) or without_weights(files):
        raise UserError(f"{folder} has no weights in safetensors: export the student again.")
    leaks = files_with_secrets(files, known_tokens(token))
    if leaks:
        raise UserError(f"an access token is in {', '.join(leaks)}: remove it there, and make a new one on the Hub.")
    return files


class _Push:
    """One push and what the Hub has said about it so far."""

    def __init__(self, api, repo_id, files, branch, create_pr, message):
        self.api, self.files, self.branch, self.create_pr, self.message = api, files, branch, create_pr, message
        self.repo_id, self.url, self.head, self.there = repo_id, None, None, None
        self.components = {path.split("/")[0] for path in files if re.fullmatch(r"\w+/\w*config\.json", path)}

    def prepare(self, private):
        """See to repository and branch."""
        created = persistently(self.api.create_repo, self.repo_id, private=private or None, exist_ok=True)
        self.repo_id, self.url = created.repo_id, str(created)
        # An existing repository keeps its visibility, whatever `create_repo` was told.
        if private and not persistently(self.api.model_info, self.repo_id).private:
            raise UserError(f"{self.repo_id} is public: make it private on the Hub first, or push without --private.")
        if self.branch != "main":
            persistently(self.api.create_branch, self.repo_id, branch=self.branch, exist_ok=True)

    def compare_at(self, commit):
        return compare(self.files, persistently(tree_of, self.api, self.repo_id, commit))

    def is_all(self, there) -> bool:
        return not (there.missing or there.different or self.stale(there))

    def stale(self, there) -> list[str]:
        """Of the files that are on the Hub alone, those of an earlier student: its index, what lies in components."""
        folders = {path: path.split("/")[0] for path in there.extra if "/" in path}
        return [path for path in there.extra if path == INDEX or folders.get(path) in self.components]

    def found(self) -> Pushed | None:
        """The files where they are already: on the branch, or in a pull request if one was asked for."""
        head = persistently(self.api.model_info, self.repo_id, revision=self.branch).sha
        there = self.compare_at(head)
        if self.head is None:  # the first look: what a commit is to be made on
            self.head, self.there = head, there
            if INDEX in there.extra + there.different:
                earlier = persistently(self.api.hf_hub_download, self.repo_id, INDEX, revision=head)
                self.components |= set(re.findall(r'^  "(\w+)": \[', Path(earlier).read_text(), re.MULTILINE))
        if self.is_all(there):
            return Pushed(self.url, head, 0)
        if self.create_pr:
            refs = persistently(self.api.list_repo_refs, self.repo_id, include_pull_requests=True).pull_requests
            newest = sorted(refs, key=lambda ref: int(ref.ref.rpartition("/")[2]), reverse=True)[:PULL_REQUESTS]
            for ref in newest:
                if self.is_all(self.compare_at(ref.target_commit)):
                    return Pushed(self.pull_request(ref.ref), ref.target_commit, 0)
        return None

    def pull_request(self, ref) -> str:
        return f"{self.url}/discussions/{ref.rpartition('/')[2]}"

    def commit(self) -> Pushed:
        """Send what differs from the head in one commit, again where that may help, and see that it has arrived."""
        there = self.there
        additions = [CommitOperationAdd(name, str(self.files[name])) for name in there.missing + there.different]
        deletions = [CommitOperationDelete(name) for name in self.stale(there)]
        where = {"repo_id": self.repo_id, "revision": self.branch, "create_pr": self.create_pr}
        # The client tries this again by itself. What has arrived stays there for the next push.
        self.api.preupload_lfs_files(additions=additions, **where)
        for wait in (*WAITS, None):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the card's metadata: what is wrong with it is an error
                    done = self.api.create_commit(
                        operations=[*additions, *deletions],
                        commit_message=self.message,
                        parent_commit=self.head,
                        **where,
                    )
                break
            except Exception as error:
                # It may have been made, and only the answer lost: then it must not be made again.
                made = self.found()
                if made is not None:
                    return Pushed(made.url, made.commit, len(additions) + len(deletions))
                if wait is None or not is_passing(error):
                    raise
                pause(error, wait)
        arrived = self.compare_at(done.oid)
        if not self.is_all(arrived):
            wrong = ", ".join(arrived.missing + arrived.different) or "files that were to be deleted"
            raise UserError(f"the Hub holds something else than was sent for {wrong}: push again.")
        url = self.url if done.pr_url is None else done.pr_url
        return Pushed(url, done.oid, len(additions) + len(deletions))

    def what_is_there(self) -> str:
        """A clause on what the Hub holds, after an error."""
        if self.head is None:
            return "nothing was sent."
        try:
            head = self.api.model_info(self.repo_id, revision=self.branch).sha
        except Exception:
            return "and it does not say whether anything has arrived: push again, which sends what is missing."
        if head == self.head:
            return f"{self.branch} of {self.repo_id} is as it was."
        return f"{self.branch} of {self.repo_id} is at {head[:8]} now: push again, which compares it first."
