# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The model card: valid metadata, only what is known, no section without content."""

import json
import re
from pathlib import Path

import pytest
import tiny_pipelines
import yaml
from example_cards import EXAMPLES, GUIDANCE_OFF, STUDENTS, example_card
from huggingface_hub import ModelCard
from loopback_hub import card_errors
from training_helpers import PIPELINE_KWARGS

from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.card import METHODS, write_card
from hf_flowdistill.hub.teacher_card import is_hub_id, read_teacher_card
from hf_flowdistill.teachers import learn_contract


REPORT = [
    {
        "pipeline": "teacher",
        "num_steps": 28,
        "guidance_scale": 3.0,
        "accuracy": 0.9876,
        "accuracy_by_category": {"colours": 1.0, "counting": 0.951},
        "fid": 31.24,
        "forwards_per_image": 56,
        "seconds_per_image": 0.4321,
    },
    {
        "pipeline": "student",
        "num_steps": 4,
        "guidance_scale": None,
        "accuracy": 0.97,
        "accuracy_by_category": {"colours": 0.99},
        "fid": 40.0,
        "forwards_per_image": 4,
        "seconds_per_image": 0.03,
    },
]


@pytest.fixture
def card_of(tmp_path):
    """A function that writes the settings of a student, changed as told, and renders its card."""

    def card_of(training_args=None, report=None, **student):
        settings = {
            "exported_by": "hf_flowdistill 0",
            "student": {
                "pipeline_class": "StableDiffusion3Pipeline",
                "num_steps": 4,
                "noise_type": "fresh",
                "call_defaults": {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 0},
                "absent_components": [],
                "dtype": "float32",
                "teacher": "teacher",
                "base_model": None,
                "license": None,
                "method": "sid",
                "repo_id": None,
                **student,
            },
            "training_args": training_args or {},
        }
        (tmp_path / "training_args.json").write_text(json.dumps(settings))
        (tmp_path / "report.json").unlink(missing_ok=True)
        if report is not None:
            (tmp_path / "report.json").write_text(json.dumps(report))
        return write_card(tmp_path).read_text()

    return card_of


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def headings(card):
    return re.findall(r"^## (.*)$", card, flags=re.MULTILINE)


def test_a_card_of_what_is_always_known(card_of, tmp_path):
    card = card_of()
    assert metadata(card) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "flow-matching", "distillation", "few-step", "hf_flowdistill"],
    }
    assert headings(card) == ["How to use it", "Training", "Limits and biases", "Citation"]
    assert "# teacher in 4 steps" in card and f'student = "{tmp_path.name}"' in card
    assert "num_inference_steps=4, guidance_scale=1.0, max_sequence_length=0)" in card
    assert "arxiv.org/abs/2509.25127" in card and "arXiv:2509.25127" in card
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "diffusers"


def test_a_card_of_everything(card_of, tmp_path):
    (tmp_path / "grid.png").write_bytes(b"")
    card = card_of(
        training_args={
            "learning_rate": 1e-6,
            "weighting": "1-sigma",
            "output_dir": "x",
            "max_grad_norm": None,
            "prompts": "sha",
            "dataset_name": "org/prompts",
            "images_seen": 9,
        },
        report={"rows": REPORT, "protocol": "2,000 prompts, one image each.", "dataset": "COCO 2014, 10k"},
        teacher="org/teacher",
        base_model="org/teacher",
        teacher_card={
            "license": "other",
            "license_name": "their-non-commercial-license",
            "license_link": "https://huggingface.co/org/teacher/blob/main/LICENSE.md",
            "gated": "auto",
            "extra_gated_prompt": "Do you agree?",
        },
        run={"images_seen": 1_000_192, "hardware": "8 x H100", "training_hours": 152.65, "device_hours": 1221.2},
        repo_id="me/student",
        num_steps=4,
        absent_components=["text_encoder_3", "tokenizer_3"],
        example_prompt='a "red" fox',
        grid_prompts=["a fox", "a cat"],
    )
    assert card_errors(card) == []
    data = metadata(card)
    assert data["base_model"] == "org/teacher" and data["base_model_relation"] == "finetune"
    assert (data["license"], data["license_name"]) == ("other", "their-non-commercial-license")
    assert data["extra_gated_prompt"] == "Do you agree?" and "gated" not in data
    assert data["datasets"] == ["org/prompts"] and data["widget"] == [{"text": "a fox"}, {"text": "a cat"}]
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert model["name"] == "student" and result["dataset"] == {"type": "coco-2014-10k", "name": "COCO 2014, 10k"}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"accuracy": 0.97, "fid": 40.0}
    loaded = ModelCard.load(tmp_path / "README.md").data
    assert {r.metric_type: r.metric_value for r in loaded.eval_results} == {"accuracy": 0.97, "fid": 40.0}

    assert headings(card) == ["How to use it", "Evaluation", "Training", "Limits and biases", "Licence", "Citation"]
    assert "# org/teacher in 4 steps\n" in card and "![Samples](grid.png)" in card
    assert 'From top to bottom: "a fox", "a cat".' in card and 'pipe("a \\"red\\" fox"' in card
    assert 'student = "me/student"' in card and "(student, text_encoder_3=None, tokenizer_3=None, dtype" in card
    assert "2,000 prompts, one image each." in card
    assert "| teacher | 28 | 3 | 98.8% | 31.2 | 56 | 0.432 |" in card
    assert "| student | 4 |  | 97.0% | 40.0 | 4 | 0.03 |" in card
    assert "| pipeline | steps | colours | counting |" in card and "| student | 4 | 99.0% |  |" in card
    assert "| images seen | 1,000,192 |" in card and "| hardware | 8 x H100 |" in card
    assert "| hours of updates | 152.7 |" in card and "| cost in device hours | 1,221.2 |" in card
    assert "| `learning_rate` | `1e-06` |" in card and "| `weighting` | `1-sigma` |" in card
    assert not re.search("`(output_dir|max_grad_norm|prompts|images_seen)`", card)
    assert "[their-non-commercial-license](https://huggingface.co/org/teacher/blob/main/LICENSE.md), the teach" in card
    assert "does not allow commercial use" in card and "Access to the teacher is gated" in card


@pytest.mark.parametrize(
    ("teacher_card", "present", "absent"),
    [
        ({}, "which its card does not name in its metadata", "commercial"),
        ({"license": "apache-2.0"}, "apache-2.0, the teacher's", "commercial"),
        ({"license": "cc-by-nc-4.0"}, "does not allow commercial use", "gated"),
        (
            {"license": "other", "license_name": "stabilityai-ai-community"},
            "stabilityai-ai-community, the",
            "commercial",
        ),
        ({"license": "mit", "gated": "manual"}, "Access to the teacher is gated", "commercial"),
    ],
)
def test_the_licence_is_the_teachers(card_of, teacher_card, present, absent):
    card = card_of(base_model="org/teacher", teacher="org/teacher", teacher_card=teacher_card)
    licence = re.split("^## ", card, flags=re.MULTILINE)[-2]
    assert licence.startswith("Licence") and present in licence and absent not in licence
    assert metadata(card).get("license") == teacher_card.get("license") and card_errors(card) == []


def test_results_are_told_to_the_hub_only_with_what_they_were_measured_on(card_of):
    assert "model-index" not in metadata(card_of(report=REPORT))
    report = {"rows": REPORT, "dataset": "shapes"}
    assert metadata(card_of(report=report))["model-index"][0]["results"][0]["dataset"]["type"] == "shapes"
    assert "model-index" not in metadata(card_of(report=report, num_steps=2)), "the row is of four steps"


def test_someone_elses_student_is_told_as_such(card_of):
    card = card_of(published_by="their/student")
    assert "by the authors of\n[their/student](https://huggingface.co/their/student)" in card


def test_columns_and_tables_without_numbers_are_absent(card_of):
    rows = [{"pipeline": "student", "num_steps": 4, "accuracy": 0.5, "fid": None}]
    card = card_of(report=rows)
    assert "| pipeline | steps | accuracy |\n" in card
    assert "FID" not in card and "by category" not in card
    assert "Evaluation" not in card_of(report=[])


@pytest.mark.parametrize("noise_type", ["fresh", "fixed", "ddim"])
def test_the_card_says_what_holds_for_the_noise_type(card_of, noise_type):
    card = card_of(noise_type=noise_type)
    same_image = "Both draw the same image from the same seed" in card
    assert same_image == (noise_type != "fixed")
    assert ("pass no `generator`" in card) == (noise_type == "fresh")


@pytest.mark.parametrize("noise_type", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("filled", [False, True])
def test_nothing_is_left_over(card_of, noise_type, filled):
    extra = {"report": REPORT, "teacher_card": {"license": "mit"}, "training_args": {"alpha": 1.0}} if filled else {}
    card = card_of(noise_type=noise_type, **extra)
    assert not re.search(r"TODO|TBD|More Information|\{\{|\}\}\}|\{%|None\b|nan|\n\n\n", card)
    sections = re.split(r"^## .*$", card, flags=re.MULTILINE)[1:]
    assert all(len(section.strip()) > 2 for section in sections)


@pytest.mark.parametrize("wrong", ["not json", '"text"', '{"rows": 1}', '{"fid": 3}', "[1]"])
def test_a_report_that_is_none_is_refused(card_of, tmp_path, wrong):
    card_of()
    (tmp_path / "report.json").write_text(wrong)
    with pytest.raises(UserError, match=r"report .*report\.json (cannot be read|must be a list of rows)"):
        write_card(tmp_path)


def test_only_an_organisation_and_a_name_are_a_hub_id(tmp_path, monkeypatch):
    assert is_hub_id("stabilityai/stable-diffusion-3.5-medium")
    for path in ("/home/me/teacher", "teacher", "./teacher", "../teacher", "examples/shapes/teacher", "~/teacher"):
        assert not is_hub_id(path), path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    assert not is_hub_id("runs/teacher")


def test_the_licence_of_a_local_teacher_is_read_from_its_card(tmp_path):
    assert read_teacher_card(tmp_path) == {}
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n# Teacher\n"
    )
    assert read_teacher_card(tmp_path) == {"license": "other", "license_name": "x"}, (
        "a link into a folder leads nowhere"
    )
    for unreadable in (
        "# A card without metadata\n",
        "---\nlicense: [mit\n---\n",
        "---\n- mit\n---\n",
        "---\n1: a\n---\n",
    ):
        (tmp_path / "README.md").write_text(unreadable)
        assert read_teacher_card(tmp_path) == {}, unreadable


@pytest.mark.parametrize("recipe", STUDENTS)
def test_the_example_cards_are_what_the_export_writes(recipe):
    card = (EXAMPLES / f"{recipe.rpartition('_')[0]}.md").read_text(encoding="utf-8")
    assert card == example_card(recipe), "make them again: PYTHONPATH=src:tests:examples python tests/example_cards.py"
    assert card_errors(card) == [] and "## Evaluation" not in card and "images seen" not in card


@pytest.mark.parametrize("name", ["stable_diffusion_3", "sana", "flux"])
def test_the_example_cards_turn_guidance_off_as_the_contract_does(name):
    pipeline = getattr(tiny_pipelines, name)()
    contract = learn_contract(pipeline, height=32, width=32, pipeline_kwargs=PIPELINE_KWARGS.get(name, {}))
    assert contract.student_arguments(4) == GUIDANCE_OFF[type(pipeline).__name__]


def test_a_folder_that_is_no_student_gets_no_card(tmp_path):
    with pytest.raises(UserError, match="holds no exported student"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_papers_are_those_of_citation_cff():
    citation = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text())
    papers = {reference["identifiers"][0]["value"]: reference for reference in citation["references"]}
    for method in METHODS.values():
        paper = papers[f"arXiv:{method['arxiv']}"]
        assert method["paper"] == paper["title"]
        names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
        assert method["authors"] == " and ".join(names)
