# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The lines of a run: the bar, and a log that says what it reads and nothing twice."""

import io
import logging
import re

from accelerate.logging import get_logger
from accelerate.state import PartialState
from training_helpers import SCRIPT, reset_accelerate, run_command, script_arguments

from hf_flowdistill.methods.sid_adversarial import SiDAdversarial
from hf_flowdistill.training import record as record_module
from hf_flowdistill.training.launch import PlainLines
from hf_flowdistill.training.monitors import progress


VALUES = {
    "x0_gap": 0.0847,
    "latent_shift": -0.12,
    "latent_spread": 0.77,
    "fake_score_lag": 12.82,
    "real_accuracy": 1.0,
    "fake_accuracy": 1.0,
    "adversarial_share": 0.34,
}


def lines_of(output_dir, *more, **named):
    done = run_command(SCRIPT, *script_arguments(output_dir, *more, **named))
    return [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]


def test_a_run_says_what_it_reads_and_where_it_goes_on(tmp_path):
    long = "red circle " * 50
    more = ["--resume_from_checkpoint=latest", "--validation_prompts", "red circle", long, "--num_validation_images=1"]
    first, second = (lines_of(tmp_path / "run", *more, max_train_images=images, num_steps=2) for images in (8, 16))
    told = ["\n".join(re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines) for lines in (first, second)]
    folder = tmp_path / "run"
    assert f"there is no checkpoint in {folder} yet: the run starts from the beginning" in told[0]
    assert "4 prompts are encoded; " in told[0]
    assert f"4 prompts are read from {folder / 'conditioning'}; " in told[1]
    assert f"going on from {folder / 'checkpoint-8'}, 8 of 16 images" in told[1]
    cut = r"1 of 2 validation prompts are longer than the teacher takes and are cut, .*'red circle red.*\.\.\.'"
    for text, lines in zip(told, (first, second)):
        assert re.search(cut, text)
        bars = [line for line in lines if "img/s" in line or "s/img" in line]
        assert bars and max(map(len, bars)) <= 100
        assert re.search(r"\[\d\d:\d\d<.*, k=[12] gap \d", bars[-1])
        rest = [line for line in lines if line not in bars]
        assert len(set(rest)) == len(rest) and "RANK" not in text and "Failed to load" not in text


def test_the_bar_of_a_million_images_fits(monkeypatch):
    """Days of them, whatever the values are; what is left out is of the least importance."""
    monkeypatch.setattr(record_module.tqdm, "status_printer", lambda *_: lambda line: None)
    bar = record_module.tqdm(total=1_000_000, unit="img", ncols=100, bar_format=record_module.BAR, file=io.StringIO())
    record = object.__new__(record_module.Record)
    record._bar = bar
    bar.start_t -= 300_000
    for seen in (1, 120_048, 999_999):
        bar.n = seen
        shown = progress(VALUES | {"k": 4}, SiDAdversarial.progress, record._room() - len(", 12 skipped"))
        bar.set_postfix_str(shown + ", 12 skipped", refresh=False)
        assert len(str(bar)) <= 100 and str(bar).endswith("12 skipped]")
        assert "k=4 told 100%/100%" in str(bar)


def test_the_log_names_no_rank_where_there_is_one_process_and_says_nothing_twice():
    reset_accelerate()
    PartialState(cpu=True)
    for alone, beginning in ((True, ""), (False, "[RANK 0] ")):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.addFilter(PlainLines(alone=alone))
        logging.getLogger("accelerate").addHandler(handler)
        try:
            for value in (1, 1, 2):
                get_logger("accelerate.somewhere").warning("a value of %s", value)
            assert handler.filter(logging.LogRecord("a", logging.WARNING, "b", 1, "no room for", (value,), None))
        finally:
            logging.getLogger("accelerate").removeHandler(handler)
        assert stream.getvalue() == f"{beginning}a value of 1\n{beginning}a value of 2\n"
    reset_accelerate()
