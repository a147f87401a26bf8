# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A loopback Hub and clients of it: processes with an HF_HOME of their own, that reach nothing else."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub


ROOT = Path(__file__).parents[1]
TOKEN = "hf_loopback_writer_token"


def environment(hub, home, token=TOKEN, **more) -> dict:
    """Nothing of this process but the path of its programs."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SSL_CERT_FILE") if name in os.environ}
    return kept | {
        "HOME": str(home),
        "HF_HOME": str(Path(home, "hf")),
        "HF_ENDPOINT": hub.url,
        **({"HF_TOKEN": token} if token else {}),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",  # a server of xet's own is needed otherwise
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "examples", ROOT / "tests"))),
        **more,
    }


def guarded(hub, home, token=TOKEN, **more) -> dict:
    """`environment` for any Python program: it and all that it starts reach the Hub only."""
    Path(home).mkdir(parents=True, exist_ok=True)
    guard = "import os; from hub_client import allow_only; allow_only(os.environ['HF_ENDPOINT'])\n"
    Path(home, "sitecustomize.py").write_text(guard)
    found = environment(hub, home, token, **more)
    return found | {"PYTHONPATH": os.pathsep.join((str(home), found["PYTHONPATH"]))}


def flowdistill(hub, home, *words, token=TOKEN, check=True, **more) -> subprocess.CompletedProcess:
    """One `flowdistill` command in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "hub_client.py"), *map(str, words)],
        env=environment(hub, home, token, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


class Client:
    """`flowdistill` commands one after the other in one process, since most of the time of a push is its start."""

    def __init__(self, hub, home):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "hub_client.py")],
            env=environment(hub, home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words) -> dict:
        """{"code", "out", "err"} of one command."""
        self.process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def running_hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def hub(running_hub):
    running_hub.clear()
    return running_hub


@pytest.fixture(scope="module")
def client(running_hub, tmp_path_factory):
    client = Client(running_hub, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


def contents(folder) -> dict[str, str]:
    """sha256 of every file below a folder, by its name there."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def published(hub, repo_id, revision="main") -> dict[str, str]:
    """sha256 of every file that the Hub has, but for the one it makes itself."""
    files = hub.repos[repo_id].files(revision)
    return {name: hashlib.sha256(text).hexdigest() for name, text in files.items() if name != ".gitattributes"}


def commits(hub, repo_id) -> int:
    """How many commits of content there are."""
    return len(hub.repos[repo_id].commits) - 1
