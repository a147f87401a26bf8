# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the Hub's client raises, of whichever HTTP library it is built on: what passes, and what to tell the user."""

import json
import time

from huggingface_hub.errors import GatedRepoError

from hf_flowdistill.errors import first_line
from hf_flowdistill.hub.secrets import known_tokens, redact


WAITS = (1, 2, 4, 8)  # seconds before another try of what the client tries only once
LONGEST_WAIT = 300  # seconds, whatever the Hub asks for
PASSING = (408, 429, 500, 502, 503, 504)
ADVICE = {
    401: "the Hub does not accept the token: log in with `hf auth login`, or give another one",
    403: "the token does not allow this: use one that does",
    404: "there is no such repository or revision, or the token may not see it",
    412: "someone else has changed the repository meanwhile: look at it before the next try",
    413: "the Hub does not take files this large",
    507: "there is no room for it on the Hub",
}


def persistently(call, *args, **kwargs):
    """`call`, again after a while where it failed for a reason that may pass."""
    for wait in (*WAITS, None):
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if wait is None or not is_passing(error):
                raise
            pause(error, wait)


def is_passing(error) -> bool:
    """Whether the Hub is busy, the connection to it was lost, or something between answered in its place."""
    status = status_of(error)
    if status is not None:
        return status in PASSING
    transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return transport or isinstance(error, ConnectionError | TimeoutError | json.JSONDecodeError)


def pause(error, seconds) -> None:
    """Wait as long as the Hub asks for, or else `seconds`."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        seconds = min(float(headers.get("Retry-After")), LONGEST_WAIT)
    except (TypeError, ValueError):  # there is none, or it is a date
        pass
    time.sleep(seconds)


def status_of(error) -> int | None:
    """The HTTP status behind an error of the client, which wraps that of an upload."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def reason(error, token=None) -> str:
    """Why it failed, and what to do about it if that is known: a clause without any token."""
    if isinstance(error, json.JSONDecodeError):
        return "the answer was not the Hub's own (no JSON)"
    text = getattr(error, "server_message", None) or first_line(error)
    text = redact(first_line(Exception(text)).rstrip("."), known_tokens(token))
    gated = "access to it is gated: ask for it on its page on the Hub, and log in"
    advice = gated if _is_gated(error) else ADVICE.get(status_of(error))
    return f"{advice} ({text})" if advice else text


def _is_gated(error) -> bool:
    return isinstance(error, GatedRepoError) or (error.__cause__ is not None and _is_gated(error.__cause__))
