# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Runs `flowdistill` in a process of its own that reaches one address only, once for every line of its input.

A first word that names a script of examples/score_distillation runs that instead.

    echo '["push", "student", "--repo_id", "me/student"]' | python tests/hub_client.py

Every line of the output is JSON: exit code, stdout and stderr of that command. Waits before another try are short.
With arguments it is one command: python tests/hub_client.py push student --repo_id me/student.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import time
from urllib.parse import urlsplit


def allow_only(url: str) -> None:
    """Refuse connections to anything but this address; the name localhost is the same machine."""
    port = urlsplit(url).port

    def check(event, arguments):
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            host, asked = arguments[1][:2]
            if host not in ("127.0.0.1", "::1", "localhost") or asked != port:
                raise PermissionError(f"this process may not reach {host}:{asked}")
        if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost"):
            raise PermissionError(f"this process may not look up {arguments[0]}")

    sys.addaudithook(check)


SCRIPTS = ("generate", "train_sid_dit")


def run(words):
    name = f"score_distillation.{words[0]}" if words[0] in SCRIPTS else "hf_flowdistill.cli"
    main, words = importlib.import_module(name).main, words[words[0] in SCRIPTS :]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code or 0
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    allow_only(os.environ["HF_ENDPOINT"])
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.02))
    if sys.argv[1:]:
        importlib.import_module("hf_flowdistill.cli").main(sys.argv[1:])
    else:
        # Its log keeps the stderr of its import, which would otherwise be the first command's.
        with contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module("huggingface_hub.utils.logging")
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line))), flush=True)
