# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The student's model card. What is not known is not in it."""

import json
import re
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.hub.teacher_card import is_hub_id, is_non_commercial


REPORT_FILE = "report.json"
GRID_FILE = "grid.png"
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
METHODS["sid_adversarial"] = METHODS["sid"] | {
    "name": "SiD-DiT with an adversarial term (SiD2a)",
    "summary": (
        "A second network, the fake score, learns the distribution of what the student draws, while the student "
        "learns to make teacher and fake score agree on it. The student was distilled so without images before; here "
        "it went on with images and their captions, on which the fake score also learns to tell images from what the "
        "student draws, and the student to be taken for one: it leans towards their style."
    ),
}
METHODS["freeflow"] = {
    "name": "FreeFlow (flow map distillation without data)",
    "arxiv": "2511.19428",
    "paper": "Flow Map Distillation Without Data",
    "summary": (
        "The student jumps from noise to an image at once. It learns to follow the teacher's flow from noise, and a "
        "second network, the fake score, learns the distribution of where the jumps end, by which they are corrected. "
        "Training needs prompts, but no images."
    ),
    "key": "tong2025flow",
    "authors": "Tong, Shangyuan and Ma, Nanye and Xie, Saining and Jaakkola, Tommi",
}
# Arguments that say how and where a run was made, not what was trained.
NOT_HYPERPARAMETERS = re.compile(
    "config$|pretrained_model|student_model|revision|variant|.*_dir$|.*_file$|resume|checkpoint|checkpoints_total|validation|"
    "num_validation|report_to|tracker|push_to_hub|hub_|dataloader|local_rank|pipeline_kwargs|prompts$|"
    "teacher_(weights|config)|images_seen|dataset_|caption_column|dry_run|images_per_second"
)
COLUMNS = {
    "pipeline": ("pipeline", str),
    "num_steps": ("steps", str),
    "guidance_scale": ("guidance", "{:g}".format),
    "accuracy": ("accuracy", "{:.1%}".format),
    "geneval": ("GenEval", "{:.3f}".format),
    "clip_score": ("CLIP score", "{:.3g}".format),
    "fid": ("FID", "{:.1f}".format),
    "forwards_per_image": ("transformer forwards per image", "{:g}".format),
    "seconds_per_image": ("seconds per image", "{:.3g}".format),
}
NOT_ALWAYS_NOTED = {  # by exports of earlier versions: what it was then
    "shared_components": "copied",
    "teacher_card": {},
    "run": {},
    "published_by": None,
    "not_reached": [],
    "example_prompt": None,
    "grid_prompts": [],
}
METRICS = ("accuracy", "geneval", "clip_score", "fid")  # columns that are a result, for the Hub's model-index


def _hours(hours) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


FACTS = {
    "averaged": ("mean of the weights of", "{} checkpoints".format),
    "images_seen": ("images seen", "{:,}".format),
    "hardware": ("hardware", str),
    "training_hours": ("hours of updates", _hours),
    "device_hours": ("cost in device hours", _hours),
    "skipped_updates": ("updates left out, since a loss or gradient was not finite", str),
}


def write_card(folder) -> Path:
    """Render README.md of an exported student from its training_args.json, and report.json and grid.png if there.

    Raises:
        UserError: if `folder` holds no exported student, or a report that cannot be read.
    """
    folder = Path(folder)
    settings = read_settings(folder) if folder.is_dir() else None
    if settings is None:
        raise UserError(f"{folder} holds no exported student: a card can be written for nothing else.")
    report = read_report(folder / REPORT_FILE) if (folder / REPORT_FILE).exists() else {"rows": []}
    location = settings["student"].get("repo_id") or folder.resolve().name
    grid = GRID_FILE if (folder / GRID_FILE).exists() else None
    ModelCard(render_card(settings, report, location=location, grid=grid)).save(folder / "README.md")
    return folder / "README.md"


def render_card(settings, report, *, location, grid=None) -> str:
    """The text of a card.

    Args:
        settings: of training_args.json.
        report: as `read_report` returns it.
        location: what the snippets load: an id or the name of a folder.
        grid: name of a picture.
    """
    student, training_args = {**NOT_ALWAYS_NOTED, **settings["student"]}, settings["training_args"]
    return _template("student.md").render(
        metadata=card_data(student, training_args, report, location).to_yaml(),
        student=student,
        method=METHODS[student["method"]],
        location=location,
        call=as_arguments(student["call_defaults"]),
        absent="".join(f"{name}=None, " for name in student["absent_components"]),
        prompt=json.dumps(student["example_prompt"] or "a photograph of a red fox", ensure_ascii=False),
        grid=grid,
        licence={**dict.fromkeys(("license", "license_name", "license_link", "gated")), **student["teacher_card"]},
        non_commercial=is_non_commercial(student["teacher_card"]),
        protocol=report.get("protocol"),
        evaluation=evaluation_table(report["rows"]),
        categories=category_table(report["rows"]),
        facts=_table(
            ["", ""],
            [[name, show(student["run"][key])] for key, (name, show) in FACTS.items() if student["run"].get(key)],
        ),
        sizes=", ".join(f"{height}x{width}" for height, width in training_args.get("aspect_ratio_buckets") or []),
        hyperparameters=hyperparameter_table(training_args),
    )


def card_data(student, training_args, report, location) -> ModelCardData:
    """The card's metadata. A teacher or a dataset from a local folder is not in it: the Hub takes ids only."""
    base_model, dataset = student["base_model"], training_args.get("dataset_name")
    prompts = student["grid_prompts"] or [prompt for prompt in [student["example_prompt"]] if prompt]
    results = eval_results(student, report)
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        tags=["text-to-image", "diffusers", "flow-matching", "distillation", "few-step", "hf_flowdistill"],
        datasets=[dataset] if dataset and is_hub_id(dataset) else None,
        widget=[{"text": prompt} for prompt in prompts] or None,
        model_name=location.split("/")[-1] if results else None,
        eval_results=results or None,
        **{name: value for name, value in student["teacher_card"].items() if name != "gated"},
    )


def eval_results(student, report) -> list[EvalResult]:
    """The metrics of the student's own number of steps, if it is said on what they were measured."""
    dataset = report.get("dataset")
    rows = [r for r in report["rows"] if r.get("pipeline") == "student" and r.get("num_steps") == student["num_steps"]]
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=re.sub(r"[^\w/.-]+", "-", dataset).lower(),
            dataset_name=dataset,
            metric_type=metric,
            metric_name=COLUMNS[metric][0],
            metric_value=row[metric],
        )
        for row in rows[:1]
        for metric in METRICS
        if dataset and row.get(metric) is not None
    ]


def read_report(path) -> dict:
    """An evaluation: {"rows": [...], "protocol": ..., "dataset": ...}, or the rows alone.

    A row is a mapping with any of pipeline ("teacher", "undistilled", "student"), num_steps, guidance_scale, accuracy,
    accuracy_by_category (a mapping), geneval, clip_score, fid, forwards_per_image, seconds_per_image. `protocol` is a
    sentence or two on how they were measured, `dataset` the name of what on.

    Raises:
        UserError: if it is not that.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the report {path} cannot be read: {error}.") from None
    report = {"rows": report} if isinstance(report, list) else report
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"the report {path} must be a list of rows, or a mapping with 'rows'.")
    return report


def as_arguments(call_defaults) -> str:
    """As they stand in a call: "height=512, width=512"."""
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
