# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The student's model card. What is not known is not in it."""

import json
import re
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.student import read_settings


METHODS = {
    "sid": {
        "name": "SiD-DiT (score identity distillation)",
        "arxiv": "2509.25127",
        "paper": "Score Distillation of Flow Matching Models",
        "summary": (
            "A second network, the fake score, learns the distribution of what the student draws, while the student "
            "learns to make teacher and fake score agree on it. Training needs prompts, but no images."
        ),
        "key": "zhou2025score",
        "authors": (
            "Zhou, Mingyuan and Gu, Yi and Zheng, Huangjie and Song, Liangchen and He, Guande and Zhang, Yizhe and "
            "Hu, Wenze and Yang, Yinfei"
        ),
    },
}
# Arguments that say how and where a run was made, not what was trained.
NOT_HYPERPARAMETERS = re.compile(
    "config$|pretrained_model|revision|variant|.*_dir$|.*_file$|resume|checkpoint|checkpoints_total|validation|"
    "num_validation|report_to|tracker|push_to_hub|hub_|dataloader|local_rank|pipeline_kwargs|prompts$|teacher_weights"
)
COLUMNS = {
    "pipeline": ("pipeline", str),
    "num_steps": ("steps", str),
    "guidance_scale": ("guidance", "{:g}".format),
    "accuracy": ("accuracy", "{:.1%}".format),
    "fid": ("FID", "{:.1f}".format),
    "forwards_per_image": ("transformer forwards per image", "{:g}".format),
    "seconds_per_image": ("seconds per image", "{:.3g}".format),
}


def write_card(folder, *, report=None, protocol=None, example_prompt="a photograph of a red fox") -> Path:
    """Render README.md of an exported student from the settings in its training_args.json.

    Args:
        folder: of the student. If it holds a grid.png, the card shows it.
        report: rows of an evaluation: mappings with any of pipeline, num_steps, guidance_scale, accuracy,
            accuracy_by_category (a mapping), fid, forwards_per_image, seconds_per_image. Without rows, no table.
        protocol: a sentence or two on how these numbers were measured.
        example_prompt: what the snippets ask for.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    if settings is None:
        raise UserError(f"{folder} holds no exported student: a card can be written for nothing else.")
    student, training_args = settings["student"], settings["training_args"]
    content = _template("student.md").render(
        metadata=card_data(student).to_yaml(),
        student=student,
        method=METHODS[student["method"]],
        location=student["repo_id"] or folder.resolve().name,
        call=call_arguments(student["call_defaults"]),
        prompt=json.dumps(example_prompt, ensure_ascii=False),
        grid="grid.png" if (folder / "grid.png").exists() else None,
        protocol=protocol,
        evaluation=evaluation_table(report or []),
        categories=category_table(report or []),
        sizes=", ".join(f"{height}x{width}" for height, width in training_args.get("aspect_ratio_buckets") or []),
        hyperparameters=hyperparameter_table(training_args),
    )
    card = ModelCard(content)
    card.save(folder / "README.md")
    return folder / "README.md"


def card_data(student) -> ModelCardData:
    """The card's metadata. A teacher from a local folder is no `base_model`: the Hub takes ids only."""
    base_model = student["base_model"]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=student["license"],
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        tags=["text-to-image", "diffusers", "flow-matching", "distillation", "few-step", "hf_flowdistill"],
    )


def is_hub_id(name) -> bool:
    """Whether `name` can only be meant as organisation/name on the Hub."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).exists()


def local_license(teacher) -> str | None:
    """The licence that the card in a local teacher's folder states, if there is one that can be read."""
    readme = Path(teacher) / "README.md"
    try:
        return ModelCard.load(readme).data.license if readme.is_file() else None
    except (OSError, TypeError, ValueError, yaml.YAMLError):  # No reason to lose a finished training.
        return None


def call_arguments(call_defaults) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in call_defaults.items())


def evaluation_table(report) -> str:
    """A Markdown table of the columns that some row has."""
    present = [name for name in COLUMNS if any(row.get(name) is not None for row in report)]
    rows = [[_cell(row.get(name), COLUMNS[name][1]) for name in present] for row in report]
    return _table([COLUMNS[name][0] for name in present], rows)


def category_table(report) -> str:
    """Accuracy by category, one column each, for the rows that have it."""
    report = [row for row in report if row.get("accuracy_by_category")]
    categories = list(dict.fromkeys(name for row in report for name in row["accuracy_by_category"]))
    rows = [
        [str(row.get("pipeline")), _cell(row.get("num_steps"), str)]
        + [_cell(row["accuracy_by_category"].get(name), "{:.1%}".format) for name in categories]
        for row in report
    ]
    return _table(["pipeline", "steps", *categories], rows)


def hyperparameter_table(training_args) -> str:
    rows = [
        [f"`{name}`", f"`{value}`"]
        for name, value in training_args.items()
        if value not in (None, "", [], {}) and not NOT_HYPERPARAMETERS.match(name)
    ]
    return _table(["argument", "value"], rows)


def _cell(value, show) -> str:
    return "" if value is None else show(value)


def _table(header, rows) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _template(name):
    """A template of model_cards/, which an installed package has inside it and a checkout beside src/."""
    here = Path(__file__).resolve()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here.parents[1] / "model_cards", here.parents[3] / "model_cards"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)
