# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Pushing and verifying with the real client, against a Hub that fails in every way at every stage."""

import itertools
import json
import signal
import subprocess
import sys
import time

import pytest
from hub_helpers import ROOT, TOKEN, client, commits, contents, environment, flowdistill, hub, published, running_hub

from hf_flowdistill.hub import push
from hf_flowdistill.hub.client_errors import ADVICE
from hf_flowdistill.hub.push import push_student


__all__ = ["client", "hub", "running_hub"]  # fixtures
STAGES = ("create", "info", "tree", "preupload", "batch", "put", "validate", "commit")
FAULTS = ("reset", "lost", "cut", "flip", "page", 401, 403, 429, 500, 503, 507)


@pytest.fixture
def student(tmp_path):
    """The files of a student as far as a push looks at them."""
    folder = tmp_path / "my student"
    (folder / "transformer").mkdir(parents=True)
    (folder / "training_args.json").write_text(json.dumps({"exported_by": "hf_flowdistill 0", "student": {}}))
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", "SD3Transformer2DModel"]}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A student\n")
    (folder / "pipeline.py").write_text("# code\n")
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "transformer" / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "left.safetensors").write_bytes(b"not for the Hub")
    return folder


def wanted(student):
    return {name: digest for name, digest in contents(student).items() if not name.startswith("checkpoint-")}


def pushed(client, student, *words):
    done = client("push", student, "--repo_id", "me/student", *words)
    assert TOKEN not in done["out"] + done["err"]
    assert done["code"] in (0, 2) and "Traceback" not in done["err"]
    assert bool(done["err"]) == (done["code"] == 2) == (not done["out"])
    assert done["err"].count("\n") == (done["code"] == 2), done["err"]
    return done


def test_a_push_is_one_commit_and_a_second_one_none(hub, client, student):
    assert pushed(client, student)["out"].startswith(f"{hub.url}/me/student at ")
    assert published(hub, "me/student") == wanted(student) and commits(hub, "me/student") == 1
    assert "everything was there already" in pushed(client, student)["out"]
    assert commits(hub, "me/student") == 1
    assert not [line for line in hub.log if line[0] in ("put", "download") and line[2]], "the token went to the store"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_after_any_fault_at_any_stage_another_push_ends_well(hub, client, student, stage, fault):
    """Nothing half-published is called a success, nothing published is called a failure."""
    hub.faults[stage] = itertools.repeat(fault)
    first = pushed(client, student)
    there = published(hub, "me/student") if "me/student" in hub.repos else {}
    assert there in ({}, wanted(student))
    if first["code"] == 0:
        assert there == wanted(student)
    elif fault in (401, 403, 507):
        assert ADVICE[fault] in first["err"]
    hub.faults.clear()
    assert pushed(client, student)["code"] == 0
    assert published(hub, "me/student") == wanted(student) and commits(hub, "me/student") == 1


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", ["reset", "lost", "slow", "page", 429, 503])
def test_a_fault_that_passes_is_waited_for(hub, client, student, stage, fault):
    hub.faults[stage] = [fault, fault]
    assert pushed(client, student)["code"] == 0
    assert published(hub, "me/student") == wanted(student) and commits(hub, "me/student") == 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_token_that_is_revoked_on_the_way(hub, client, student, stage):
    tokens = dict(hub.tokens)
    hub.faults[stage] = [hub.tokens.clear]
    first = pushed(client, student)
    # what is stored goes there without the token, and the next request has it again
    assert first["code"] == 2 and ADVICE[401] in first["err"]
    hub.tokens.update(tokens)
    assert pushed(client, student)["code"] == 0
    assert published(hub, "me/student") == wanted(student) and commits(hub, "me/student") == 1


def test_a_push_that_is_killed_is_finished_by_the_next(hub, client, student, tmp_path):
    reached = []

    def wait():
        reached.append(True)
        time.sleep(1)

    hub.faults["put"] = [wait]
    words = [sys.executable, ROOT / "tests" / "hub_client.py", "push", student, "--repo_id", "me/student"]
    process = subprocess.Popen([str(word) for word in words], env=environment(hub, tmp_path / "home"))
    while not reached:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert published(hub, "me/student") == {}
    assert pushed(client, student)["code"] == 0
    assert published(hub, "me/student") == wanted(student) and commits(hub, "me/student") == 1


def test_xet_without_its_server_is_one_sentence(hub, client, student, tmp_path):
    """The loopback Hub has no store for xet, which the client prefers where it is installed."""
    words = ("push", student, "--repo_id", "me/student")
    done = flowdistill(hub, tmp_path / "xet", *words, check=False, HF_HUB_DISABLE_XET="0")
    assert (done.returncode == 0) == (published(hub, "me/student") == wanted(student))
    if done.returncode:
        assert "main of me/student is as it was" in done.stderr and "Traceback" not in done.stderr
    assert pushed(client, student)["code"] == 0
    assert published(hub, "me/student") == wanted(student) and commits(hub, "me/student") == 1


def test_someone_elses_commit_on_the_way_is_not_written_over(hub, client, student):
    pushed(client, student)
    (student / "pipeline.py").write_text("# other code\n")
    repo = hub.repos["me/student"]
    theirs = {**repo.files(), "README.md": b"theirs"}
    hub.faults["preupload"] = [lambda: repo.add("main", "their commit", repo.heads["main"], theirs)]
    assert ADVICE[412] in pushed(client, student)["err"]
    assert repo.files()["README.md"] == b"theirs" and repo.files()["pipeline.py"] == b"# code\n"


def test_files_of_an_earlier_student_go_and_those_of_the_user_stay(hub, client, student):
    pushed(client, student)
    repo = hub.repos["me/student"]
    by_hand = {"LICENSE.md": b"terms", "images/one.png": b"picture", "lora/adapter_config.json": b"{}"}
    index = b'{\n  "transformer": [\n    "diffusers"\n  ],\n  "vae": [\n    "diffusers"\n  ]\n}'
    earlier = {"model_index.json": index, "vae/config.json": b"{}", "vae/model.safetensors": b"weights"}
    repo.add("main", "by hand", repo.heads["main"], {**repo.files(), **by_hand, **earlier})
    weights = student / "transformer" / "model.safetensors"
    weights.rename(weights.with_name("model-00001-of-00001.safetensors"))
    assert pushed(client, student)["code"] == 0
    files = published(hub, "me/student")
    assert set(files) - set(wanted(student)) == set(by_hand)
    assert commits(hub, "me/student") == 3


def test_branches_and_pull_requests(hub, client, student):
    pushed(client, student)
    (student / "pipeline.py").write_text("# of a checkpoint\n")
    for _ in range(2):
        assert pushed(client, student, "--revision", "checkpoint-5")["code"] == 0
    assert published(hub, "me/student", "checkpoint-5") == wanted(student)
    assert commits(hub, "me/student") == 2

    (student / "pipeline.py").write_text("# for discussion\n")
    hub.faults["commit"] = ["lost"]
    for _ in range(2):
        assert f"{hub.url}/me/student/discussions/1 at" in pushed(client, student, "--create_pr")["out"]
    assert published(hub, "me/student", "refs/pr/1") == wanted(student)
    assert published(hub, "me/student") != wanted(student)
    assert commits(hub, "me/student") == 3
    refused = client("push", student, "--repo_id", "me/student", "--create_pr", "--revision", "x")
    assert refused["code"] == 2 and "--create_pr is against main" in refused["err"]


def test_private_means_private(hub, client, student):
    assert pushed(client, student, "--private")["code"] == 0
    assert hub.repos["me/student"].private
    hub.repos["me/student"].private = False
    assert "is public" in pushed(client, student, "--private")["err"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda s: (s / "training_args.json").unlink(), "holds no exported student"),
        (lambda s: (s / "transformer" / "model.safetensors").unlink(), "no weights in safetensors"),
        (
            lambda s: (s / "transformer" / "model.safetensors").rename(s / "transformer" / "model.bin"),
            "no weights in safetensors",
        ),
        (lambda s: (s / "notes.txt").write_text(f"my {TOKEN}"), "an access token is in notes.txt"),
        (lambda s: (s / "README.md").write_text("---\nlicense: mine\n---\n"), "Invalid metadata in README.md"),
    ],
)
def test_what_should_not_be_published_is_not(hub, client, student, spoil, sentence):
    spoil(student)
    assert sentence in pushed(client, student)["err"]
    assert "me/student" not in hub.repos or published(hub, "me/student") == {}


def test_ids_and_namespaces_that_are_not_ours(hub, client, student):
    for wrong, sentence in (("a/b/c", "is no repository id"), ("you/student", ADVICE[403])):
        done = client("push", student, "--repo_id", wrong)
        assert done["code"] == 2 and sentence in done["err"]
    assert hub.repos == {}


# ------------------------------------------------------------------------------------------------------------- verify


def verified(client, *words):
    done = client("verify", *words)
    assert done["code"] in (0, 2) and "Traceback" not in done["err"] and TOKEN not in done["err"]
    return done


def test_a_wrong_byte_in_a_download_is_noticed(hub, client, student, tmp_path):
    pushed(client, student)
    cache = ("--cache_dir", tmp_path / "cache")
    hub.faults["download"] = ["flip"]
    told = verified(client, "me/student", *cache)
    assert told["code"] == 2
    assert "transformer/model.safetensors is not what the Hub has" in told["err"] and "--force-download" in told["err"]
    assert verified(client, "me/student", *cache)["code"] == 2, "the wrong byte is in the cache now"
    fresh = verified(client, "me/student", "--cache_dir", tmp_path / "other")
    assert fresh["code"] == 0 and "all 7 files are as on the Hub" in fresh["out"]


def test_a_folder_is_compared_with_the_hub(hub, client, student):
    pushed(client, student)
    (student / "README.md").write_text("changed here")
    (student / "pipeline.py").unlink()
    told = verified(client, "me/student", "--local_dir", student)["err"]
    assert "README.md is not what the Hub has" in told and "pipeline.py is missing" in told


@pytest.mark.parametrize("stage", ["info", "tree", "resolve", "download"])
@pytest.mark.parametrize("fault", ["reset", "cut", "slow", 401, 403, 429, 500, 503])
def test_a_download_that_fails_is_no_success(hub, client, student, tmp_path, stage, fault):
    pushed(client, student)
    hub.faults[stage] = itertools.repeat(fault)
    done = verified(client, "me/student", "--cache_dir", tmp_path / "cache")
    assert (done["code"] == 0) == (fault == "slow")
    hub.faults.clear()
    assert verified(client, "me/student", "--cache_dir", tmp_path / "cache")["code"] == 0


def test_repositories_that_cannot_be_had(hub, client, tmp_path):
    hub.publish("you/pickles", {"transformer/config.json": b"{}", "transformer/model.bin": b"pickle"})
    hub.publish("you/gated", {"transformer/config.json": b"{}", "transformer/model.safetensors": b"x"}).gated = "auto"
    cache = ("--cache_dir", tmp_path / "cache")
    for repo, sentence in (
        ("you/pickles", "as pickles only"),
        ("you/gated", "access to it is gated"),
        ("you/nothing", "cannot be compared with the Hub"),
        ("nothing", "cannot be compared with the Hub"),
        ("a/b/c", "is no repository id"),
    ):
        done = verified(client, repo, *cache)
        assert done["code"] == 2 and sentence in done["err"] and done["err"].count("\n") == 1, done


def test_a_full_disk_is_told_in_a_sentence(hub, client, student, tmp_path):
    """As far as a limit on the size of files is one."""
    pushed(client, student)
    script = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
    script += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [sys.executable, "-c", script, ROOT / "tests" / "hub_client.py", "verify", "me/student"]
    env = environment(hub, tmp_path / "small")
    done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "cannot be compared with the Hub: " in done.stderr and "Traceback" not in done.stderr
    )
    assert flowdistill(hub, tmp_path / "small", "verify", "me/student").returncode == 0


# ---------------------------------------------------------------------------------------- before and after training


def in_process(hub, tmp_path, code, **more):
    """What a script prints, in a process of its own."""
    home = tmp_path / "home"
    env = environment(hub, home, **more)
    prelude = "import time; sleep = time.sleep; time.sleep = lambda s: sleep(min(s, 0.02))\n"
    done = subprocess.run([sys.executable, "-c", prelude + code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


CHECK = """
from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.push import check_push
for name in ("student", "org/student", "a/b/c", "-name", "with space", ""):
    try:
        print(check_push(name))
    except UserError as error:
        print("refused:", error)
"""


def test_the_push_is_checked_before_the_training(hub, tmp_path):
    refused = [
        f"refused: {name!r} is no repository id: give name or organisation/name." for name in ("a/b/c", "-name")
    ]
    lines = in_process(hub, tmp_path, CHECK).stdout.splitlines()
    assert lines[:4] == ["me/student", "org/student", *refused]
    assert all("is no repository id" in line for line in lines[2:])

    for token, sentence in (("hf_unknown_token_of_nobody", "let us in"), (None, "hf auth login"), ("r", "only read")):
        hub.tokens["r"] = ("me", "read")
        lines = in_process(hub, tmp_path, CHECK, token=token).stdout.splitlines()
        assert all("refused" in line for line in lines) and sentence in lines[0]
        assert "hf_unknown" not in "".join(lines)


def test_a_push_that_fails_after_a_training_raises_nothing(hub, tmp_path, student):
    hub.faults["commit"] = itertools.repeat(500)
    code = f"from hf_flowdistill.hub.push import push_student; print(push_student({str(student)!r}, 'me/student'))"
    done = in_process(hub, tmp_path, code)
    assert done.stdout == "None\n" and "was not pushed to me/student" in done.stderr
    command = done.stderr.splitlines()[-1].partition("To push it later: ")[2]
    assert command == f"flowdistill push '{student}' --repo_id me/student"
    hub.faults.clear()
    assert in_process(hub, tmp_path, code).stdout == f"{hub.url}/me/student\n"


@pytest.mark.parametrize("error", [OSError, RuntimeError, ValueError, ConnectionError, AttributeError])
def test_whatever_goes_wrong_is_told_without_the_token(monkeypatch, student, capsys, error):
    def fail(*args, **kwargs):
        raise error(f"500 for Bearer {TOKEN}\nlong details")

    monkeypatch.setattr(push, "upload_student", fail)
    assert push_student(student, "me/student", token=TOKEN, private=True) is None
    message = capsys.readouterr().err
    assert "500 for Bearer [removed]" in message and TOKEN not in message and "long details" not in message
    assert message.endswith("--repo_id me/student --private\n")
