# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
import pytest

from hf_flowdistill.data.prompts import PromptStream, read_prompts
from hf_flowdistill.errors import UserError


PROMPTS = ["red", "blue", "red", "green", "white"]


def test_reading(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a café\n\n  red circle \r\na café\n", encoding="utf-8")
    assert read_prompts(path) == ["a café", "red circle", "a café"]
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(path)
    path.write_text(" \n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(path)
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path)


def test_every_pass_uses_every_line_once():
    stream = PromptStream(PROMPTS, seed=0)
    assert stream.distinct == ["red", "blue", "green", "white"] and stream.count == 5
    drawn = [stream.distinct[row] for row in stream.rows("generator", range(50))]
    passes = [drawn[start : start + 5] for start in range(0, 50, 5)]
    assert all(sorted(one) == sorted(PROMPTS) for one in passes)
    assert len({tuple(one) for one in passes}) > 5


def test_position_is_all_there_is():
    whole = PromptStream(PROMPTS, seed=0).rows("generator", range(23))
    assert whole[17:].tolist() == PromptStream(PROMPTS, seed=0).rows("generator", range(17, 23)).tolist()
    for seed, purpose in ((1, "generator"), (0, "fake_score")):
        assert whole.tolist() != PromptStream(PROMPTS, seed).rows(purpose, range(23)).tolist()
