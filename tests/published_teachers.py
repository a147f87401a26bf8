# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Folders that look like the published teachers without their weights: their configurations, and tiny tokenizers.

`published/NAME.json` holds what the model's own config.json files say, `shared` what several have in common. The
teachers of SANA-Sprint are put together from what is public of them: SANA's networks with QK normalization and times
in [0, 1] (diffusers' scripts/convert_sana_to_diffusers.py, and its pull request 11150).
"""

import functools
import json
from pathlib import Path

import tiny_pipelines
from training_helpers import folder, saved_teacher


PUBLISHED = Path(__file__).parent / "published"
TOKENIZERS = {  # a component of the tiny pipelines -> one that pads as the published one does
    "clip": lambda: tiny_pipelines.clip_tokenizer(model_max_length=77),
    "t5": lambda: tiny_pipelines.unigram_tokenizer(model_max_length=512),
    "gemma2": lambda: tiny_pipelines.unigram_tokenizer(model_max_length=8192),
}


@functools.cache
def published_teacher(name: str) -> Path:
    """A pipeline folder with the configurations of published/`name`.json."""
    shared, teacher = (json.loads((PUBLISHED / f"{file}.json").read_text()) for file in ("components", name))
    path = folder() / name
    like = saved_teacher(teacher.pop("like"))
    path.mkdir()
    (path / "model_index.json").write_text((like / "model_index.json").read_text())
    for component, config in teacher.items():
        config = shared[config.pop("shared")] | config if "shared" in config else config
        (path / component).mkdir()
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        (path / component / file).write_text(json.dumps(config))
        if component.startswith("text_encoder"):
            tokenizer = TOKENIZERS[config["model_type"].removesuffix("_text_model")]()
            tokenizer.save_pretrained(path / component.replace("text_encoder", "tokenizer"))
    return path
