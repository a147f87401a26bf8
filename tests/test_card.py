# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The model card: valid metadata, only what is known, no section without content."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.card import METHODS, is_hub_id, local_license, write_card


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

    def card_of(training_args=None, report=None, protocol=None, **student):
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
        return write_card(tmp_path, report=report, protocol=protocol).read_text()

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
    assert headings(card) == ["How to use it", "Training", "Limits", "Citation"]
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
        },
        report=REPORT,
        protocol="2,000 prompts, one image each.",
        teacher="org/teacher",
        base_model="org/teacher",
        license="apache-2.0",
        repo_id="me/student",
        num_steps=1,
        absent_components=["text_encoder_3", "tokenizer_3"],
    )
    assert metadata(card)["base_model"] == "org/teacher" and metadata(card)["license"] == "apache-2.0"
    assert metadata(card)["base_model_relation"] == "finetune"
    assert headings(card) == ["How to use it", "Evaluation", "Training", "Limits", "Licence", "Citation"]
    assert "# org/teacher in 1 step\n" in card and "![Samples](grid.png)" in card
    assert 'from_pretrained("me/student", text_encoder_3=None, tokenizer_3=None, dtype' in card
    assert "2,000 prompts, one image each." in card
    assert "| teacher | 28 | 3 | 98.8% | 31.2 | 56 | 0.432 |" in card
    assert "| student | 4 |  | 97.0% | 40.0 | 4 | 0.03 |" in card
    assert "| pipeline | steps | colours | counting |" in card and "| student | 4 | 99.0% |  |" in card
    assert "| `learning_rate` | `1e-06` |" in card and "| `weighting` | `1-sigma` |" in card
    assert not re.search("`(output_dir|max_grad_norm|prompts)`", card)


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
    extra = {"report": REPORT, "license": "mit", "training_args": {"alpha": 1.0}} if filled else {}
    card = card_of(noise_type=noise_type, **extra)
    assert not re.search(r"TODO|TBD|More Information|\{\{|\}\}\}|\{%|None\b|nan|\n\n\n", card)
    sections = re.split(r"^## .*$", card, flags=re.MULTILINE)[1:]
    assert all(len(section.strip()) > 2 for section in sections)


def test_only_an_organisation_and_a_name_are_a_hub_id(tmp_path, monkeypatch):
    assert is_hub_id("stabilityai/stable-diffusion-3.5-medium")
    for path in ("/home/me/teacher", "teacher", "./teacher", "../teacher", "examples/shapes/teacher", "~/teacher"):
        assert not is_hub_id(path), path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    assert not is_hub_id("runs/teacher")


def test_the_licence_of_a_local_teacher_is_read_from_its_card(tmp_path):
    assert local_license(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Teacher\n")
    assert local_license(tmp_path) == "apache-2.0"
    for unreadable in (
        "# A card without metadata\n",
        "---\nlicense: [mit\n---\n",
        "---\n- mit\n---\n",
        "---\n1: a\n---\n",
    ):
        (tmp_path / "README.md").write_text(unreadable)
        assert local_license(tmp_path) is None, unreadable


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
