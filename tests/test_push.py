# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Pushing, with a stand-in for the Hub's client: what it is asked to do, and what the user is told when it fails."""

import types

import pytest

from hf_flowdistill.errors import UserError
from hf_flowdistill.hub import push


TOKEN = "hf_secret"


@pytest.fixture
def hub(monkeypatch):
    """Records the calls of HfApi's methods; `hub.errors[method]` is raised instead, where it is set."""
    hub = types.SimpleNamespace(calls=[], errors={}, private=False)

    class Api:
        def __init__(self, token=None):
            hub.token = token

        def _call(self, method, result, *args, **kwargs):
            hub.calls.append((method, args, kwargs))
            if method in hub.errors:
                raise hub.errors[method]
            return result

        def whoami(self):
            return self._call("whoami", {"name": "me"})

        def create_repo(self, *args, **kwargs):
            return self._call("create_repo", "https://huggingface.co/me/student", *args, **kwargs)

        def model_info(self, *args, **kwargs):
            return self._call("model_info", types.SimpleNamespace(private=hub.private), *args, **kwargs)

        def upload_folder(self, *args, **kwargs):
            return self._call("upload_folder", None, *args, **kwargs)

    monkeypatch.setattr(push, "HfApi", Api)
    return hub


@pytest.fixture
def student(tmp_path):
    folder = tmp_path / "my student"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_push_creates_the_repository_and_uploads_the_folder(hub, student, capsys):
    url = push.push_student(student, "me/student", token=TOKEN, commit_message="End of training")
    assert url == "https://huggingface.co/me/student"
    assert [method for method, _, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1:] == (("me/student",), {"private": False, "exist_ok": True})
    uploaded = hub.calls[1][2]
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/student", student)
    assert uploaded["commit_message"] == "End of training" and "checkpoint-*/**" in uploaded["ignore_patterns"]
    assert hub.token == TOKEN
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
@pytest.mark.parametrize("error", [OSError, RuntimeError, ValueError, ConnectionError])
def test_a_failed_push_raises_nothing_and_says_how_to_go_on(hub, student, capsys, method, error):
    hub.errors[method] = error(f"500 for Bearer {TOKEN}\nlong details")
    assert push.push_student(student, "me/student", token=TOKEN) is None
    message = capsys.readouterr().err
    assert "500 for Bearer [removed]" in message and TOKEN not in message and "long details" not in message
    assert f"hf upload me/student '{student}' .\n" in message


def test_what_should_be_private_is_not_pushed_to_a_public_repository(hub, student, capsys):
    assert push.push_student(student, "me/student", private=True) is None
    assert "is public" in capsys.readouterr().err
    assert "upload_folder" not in [method for method, _, _ in hub.calls]
    hub.private = True
    assert push.push_student(student, "me/student", private=True)


def test_a_folder_without_a_student_is_not_pushed(hub, tmp_path, capsys):
    assert push.push_student(tmp_path, "me/student") is None
    assert "no exported student" in capsys.readouterr().err
    assert hub.calls == []


def test_the_push_is_checked_before_the_training(hub):
    assert push.check_push("student", token=TOKEN) == "me/student"
    assert push.check_push("org/student") == "org/student"
    for wrong in ("a/b/c", "-name", "with space", ""):
        with pytest.raises(UserError, match="no repository id"):
            push.check_push(wrong)
    hub.errors["whoami"] = RuntimeError(f"invalid token {TOKEN}")
    with pytest.raises(UserError, match=r"invalid token \[removed\].*hf auth login"):
        push.check_push("student", token=TOKEN)
