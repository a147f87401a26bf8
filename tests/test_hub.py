# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""From the training to a stranger's machine and back, through a Hub on the loopback and the real clients."""

import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
import yaml
from hub_helpers import ROOT, TOKEN, client, contents, environment, guarded, hub, published, running_hub
from loopback_hub import card_errors
from PIL import Image
from safetensors.torch import load_file, save_file
from training_helpers import quiet

from hf_flowdistill.flow.rollout import Sampler
from hf_flowdistill.hub.export import CardContent, TeacherSource, export_student
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.hub.student import few_step_pipeline, load_student


__all__ = ["client", "hub", "running_hub"]  # fixtures
LAUNCH = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q", "--config_file")
EXAMPLES = ROOT / "examples" / "score_distillation"
STRANGER = """
import os, sys, time

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_flowdistill":
            raise ImportError("hf_flowdistill is not installed here")

sys.path.append(sys.argv[1])
from hub_client import allow_only
allow_only(os.environ["HF_ENDPOINT"])
sys.path.pop()
sys.meta_path.insert(0, NotInstalled())
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
for number, snippet in enumerate(sys.stdin.read().split("-----")):
    names = {}
    exec(snippet, names)
    names["image"].save(f"image_{number}.png")
    print(type(names["pipe"]).__module__)
"""


def training_words(home, output_dir, *more):
    """Arguments of the script: shapes, two updates of two images each, pushed to me/student."""
    prompts = Path(home) / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("a red circle\na blue square\n")
    shapes = ROOT / "examples" / "shapes"
    words = ["--config", shapes / "recipe.yaml", "--pretrained_model_name_or_path", shapes / "teacher"]
    words += ["--prompt_file", prompts, "--train_batch_size=2", "--max_train_images=4", "--checkpointing_images=2"]
    words += ["--validation_images=2", "--validation_prompts", "a red circle", "--num_validation_images=2"]
    words += ["--output_dir", output_dir, "--push_to_hub", "--hub_model_id=student", f"--hub_token={TOKEN}", *more]
    return [str(word) for word in words]


def strangers_images(hub, tmp_path, card, token=None):
    """What the snippets of a card draw in a fresh process with an empty cache, where only diffusers is installed."""
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    home = tmp_path / "stranger"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(ROOT / "tests")],
        input="-----".join(snippets),
        cwd=home,
        env={name: value for name, value in environment(hub, home, token).items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    custom, stock = done.stdout.split()[-2:]
    assert custom.startswith("diffusers_modules.") and stock.startswith("diffusers.pipelines")
    return [np.asarray(Image.open(home / f"image_{number}.png")) for number in range(2)]


def drawn_here(folder, prompt):
    settings = read_settings(folder)
    student = few_step_pipeline(load_student(folder, settings, dtype=torch.float32), settings)
    return np.asarray(student(prompt, generator=torch.Generator().manual_seed(0)).images[0])


@pytest.fixture(scope="module")
def trained(running_hub, tmp_path_factory):
    """A run that has pushed its student: its folder, what it printed, and what the Hub has."""
    home = tmp_path_factory.mktemp("training")
    running_hub.clear()
    words = [*LAUNCH, EXAMPLES / "accelerate_configs" / "cpu.yaml", EXAMPLES / "train_sid_dit.py"]
    done = subprocess.run(
        [str(word) for word in words] + training_words(home, home / "run"),
        env=guarded(running_hub, home, token=None),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "run", done, running_hub.repos["me/student"]


@pytest.fixture
def pushed(trained, hub):
    """The same, with the Hub as it was after it."""
    run, done, repo = trained
    hub.repos["me/student"] = repo
    for content in repo.files().values():
        hub.objects[hashlib.sha256(content).hexdigest()] = content
    return run, done, repo


def test_a_training_ends_on_the_hub_and_at_a_stranger(pushed, hub, tmp_path, client):
    run, done, repo = pushed
    assert published(hub, "me/student") == contents(run / "student") and len(repo.commits) == 2
    card = repo.files()["README.md"].decode()
    assert card_errors(card) == [] and "| images seen | 4 |" in card and "![Samples](grid.png)" in card
    assert (
        "| hardware | 1 x CPU" in card and "hours of updates" in card and 'From top to bottom: "a red circle".' in card
    )
    here = drawn_here(run / "student", "a red circle")
    assert here.std() > 1
    for image in strangers_images(hub, tmp_path, card):
        np.testing.assert_array_equal(image, here)
    assert client("verify", "me/student")["code"] == 0


def test_no_output_of_a_run_holds_the_token(pushed):
    run, done, repo = pushed
    files = [path for path in run.parent.rglob("*") if path.is_file()]
    assert len(files) > 30 and any("events.out" in path.name for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr
    assert not [name for name, content in repo.files().items() if TOKEN.encode() in content]


def test_a_push_that_fails_ends_the_training_well_and_the_printed_command_goes_on(trained, hub, tmp_path, client):
    shutil.copytree(trained[0], tmp_path / "run")
    hub.faults["commit"] = itertools.repeat(503)
    done = client("train_sid_dit", *training_words(tmp_path, tmp_path / "run", "--resume_from_checkpoint=latest"))
    assert done["code"] == 0 and TOKEN not in done["err"]
    assert done["err"].count("fault 503") == 1
    command = re.search("To push it later: (.*)", done["err"])[1]
    assert published(hub, "me/student") == {}
    hub.faults.clear()
    program, *words = shlex.split(command)
    assert program == "flowdistill" and client(*words)["code"] == 0
    assert published(hub, "me/student") == contents(tmp_path / "run" / "student")


def test_a_checkpoint_is_exported_as_the_training_would_have(pushed, hub, client, tmp_path):
    """The last one is the student; an earlier one goes to a branch of its name."""
    run, _, repo = pushed
    last, first = tmp_path / "last", tmp_path / "first"
    assert client("export", run, "--output_dir", last)["out"] == f"{last}\n"
    theirs, ours = (load_file(f / "transformer/diffusion_pytorch_model.safetensors") for f in (run / "student", last))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs) and theirs.keys() == ours.keys()
    same = set(contents(last).items()) & set(contents(run / "student").items())
    assert {"pipeline.py", "model_index.json", "scheduler/scheduler_config.json", "grid.png"} <= {n for n, _ in same}
    assert "| images seen | 4 |" in (last / "README.md").read_text()

    report = tmp_path / "report.json"
    report.write_text(json.dumps([{"pipeline": "student", "num_steps": 4, "fid": 12.5, "accuracy": 0.5}]))
    words = ["--output_dir", first, "--dtype", "bf16", "--prompts", "a red circle", "two blue squares"]
    words += ["--report", report, "--protocol", "Ten prompts.", "--eval_dataset", "Shapes", "--license", "mit"]
    done = client("export", run / "checkpoint-2", *words)
    assert done["code"] == 0, done["err"]
    card = (first / "README.md").read_text()
    assert "| images seen | 2 |" in card and "Ten prompts." in card and "torch.bfloat16" in card
    assert "license: mit" in card and "name: Shapes" in card and card_errors(card) == []
    assert Image.open(first / "grid.png").size == (160, 80)
    assert load_file(first / "transformer/diffusion_pytorch_model.safetensors")["pos_embed.proj.weight"].dtype == (
        torch.bfloat16
    )
    assert client("push", first, "--repo_id", "student", "--revision", "checkpoint-2")["code"] == 0
    assert published(hub, "me/student", "checkpoint-2") == contents(first)
    assert published(hub, "me/student") == contents(run / "student")

    told = client("card", first, "--repo_id", "me/first", "--grid", run / "student" / "grid.png", "--license", "mit")
    assert told["code"] == 0, told["err"]
    assert 'student = "me/first"' in (first / "README.md").read_text()


# --------------------------------------------------------------------------------------- a teacher that is on the Hub


def files_of(pipeline, folder) -> dict[str, bytes]:
    with quiet():
        pipeline.save_pretrained(folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


TEACHER_CARD = b"""---
license: other
license_name: their-non-commercial-license
license_link: LICENSE.md
extra_gated_prompt: Do you agree?
---
# A teacher
"""
SANA = {"use_resolution_binning": False, "complex_human_instruction": None, "max_sequence_length": 16}


@pytest.fixture
def teacher(hub, tmp_path):
    """org/teacher, gated, of a kind whose network is told sigma itself as its time: SANA-Sprint's teacher."""
    pipeline = tiny_pipelines.sana(timestep_scale=0.001)
    repo = hub.publish("org/teacher", {**files_of(pipeline, tmp_path / "saved"), "README.md": TEACHER_CARD})
    repo.gated, repo.readers = "auto", {"me"}
    return pipeline


def as_published(transformer, tmp_path, *, flat=False, **changed) -> dict[str, bytes]:
    """A student as the authors of SiD-DiT published theirs: its network's configuration does not know the time."""
    with quiet():
        transformer.save_pretrained(tmp_path / "network")
    config = json.loads((tmp_path / "network" / "config.json").read_text())
    del config["timestep_scale"]
    index = {"_class_name": "SiDSanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}
    weights = (tmp_path / "network" / "diffusion_pytorch_model.safetensors").read_bytes()
    at = "" if flat else "transformer/"
    files = {f"{at}config.json": json.dumps(config | changed).encode()}
    files[f"{at}diffusion_pytorch_model.safetensors"] = weights
    return files if flat else files | {"model_index.json": json.dumps(index).encode()}


def sample_as_the_authors(pipeline, transformer, seed, time_scale, num_steps=4):
    """Their sampler: sigma = 1, 3/4, 1/2, 1/4, the time `time_scale` * sigma, no guidance, fresh noise."""
    generator = torch.Generator().manual_seed(seed)
    embeds, mask, *_ = pipeline.encode_prompt(
        "a fox",
        do_classifier_free_guidance=False,
        **{name: value for name, value in SANA.items() if name != "use_resolution_binning"},
    )
    x0 = torch.zeros(1, transformer.config.in_channels, 8, 8)
    for step in range(num_steps):
        sigma = 1 - step / num_steps
        x_t = (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=generator)
        velocity = transformer(
            x_t,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=torch.tensor([time_scale * sigma]),
            return_dict=False,
        )[0]
        x0 = x_t - sigma * velocity
    return x0


@torch.no_grad()
@pytest.mark.parametrize("flat", [False, True])
def test_a_student_of_the_papers_authors_gets_its_settings_from_its_teacher(hub, client, teacher, tmp_path, flat):
    torch.manual_seed(1)
    theirs = tiny_pipelines.sana().transformer
    for parameter in theirs.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    card = b"---\nbase_model: org/teacher\nlicense: other\n---\n# Theirs\n" if flat else b"# Theirs\n"
    hub.publish("you/student", {**as_published(theirs, tmp_path, flat=flat), "README.md": card})
    folder = tmp_path / "student"
    words = ["--from_repo", "you/student", "--output_dir", folder, "--resolution", 32]
    words += ["--pipeline_kwargs", json.dumps(SANA), "--repo_id", "me/theirs"]
    done = client("export", *words, *([] if flat else ["--teacher", "org/teacher"]))
    assert done["code"] == 0, done["err"]
    assert "timestep_scale is 0.001, as its teacher's, and not None" in done["out"]

    settings = read_settings(folder)
    student = few_step_pipeline(load_student(folder, settings, dtype=torch.float32), settings)
    latents = student("a fox", generator=torch.Generator().manual_seed(5), output_type="latent").images
    expected = sample_as_the_authors(student, theirs, 5, time_scale=1.0)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    assert (latents - sample_as_the_authors(student, theirs, 5, time_scale=1000.0)).abs().max() > 0.01
    card = (folder / "README.md").read_text()
    assert "by the authors of\n[you/student]" in card and card_errors(card) == []
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["base_model"] == "org/teacher" and data["license_name"] == "their-non-commercial-license"
    assert "does not allow commercial use" in card and "is gated" in card and "Do you agree?" in card


@torch.no_grad()
def test_what_is_no_student_of_the_teacher_is_refused(hub, client, teacher, tmp_path):
    files = as_published(teacher.transformer, tmp_path)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    pickle = io.BytesIO()
    torch.save({}, pickle)
    tensors = load_file(tmp_path / "network" / "diffusion_pytorch_model.safetensors")
    name, *_ = tensors
    tensors["strange"] = tensors.pop(name)
    save_file(tensors, tmp_path / "other.safetensors", metadata={"format": "pt"})
    pickles = {"transformer/config.json": b"{}", weights.replace(".safetensors", ".bin"): pickle.getvalue()}
    cases = {
        "you/pickles": (pickles, "as pickles only"),
        "you/nothing": ({"README.md": b"# Nothing\n"}, "has no transformer in safetensors"),
        "you/orphan": (files, "does not say what it was distilled from: give the --teacher"),
        "you/other": ({**files, weights: (tmp_path / "other.safetensors").read_bytes()}, "2 weights differ"),
        "you/cut": ({**files, weights: files[weights][:100]}, "is no student of org/teacher: "),
    }
    for repo, (content, sentence) in cases.items():
        hub.publish(repo, content)
        more = [] if repo == "you/orphan" else ["--teacher", "org/teacher"]
        done = client("export", "--from_repo", repo, "--output_dir", tmp_path / "refused", *more)
        assert done["code"] == 2 and sentence in done["err"] and done["err"].count("\n") == 1, (repo, done)
    hub.publish("you/gated", files).gated = "manual"
    for repo, sentence in (("you/gated", "is gated: ask for it"), ("you/absent", "no such repository")):
        done = client("export", "--from_repo", repo, "--output_dir", tmp_path / "refused", "--teacher", "org/teacher")
        assert done["code"] == 2 and sentence in done["err"], done
    assert not (tmp_path / "refused").exists()


def test_components_can_stay_with_the_teacher(hub, client, teacher, tmp_path, monkeypatch):
    """The student's repository has no text encoder and no VAE, and its snippets draw the same image."""
    from hf_flowdistill.hub import export

    card = {"license": "other", "license_name": "their-non-commercial-license", "gated": "auto"}
    monkeypatch.setattr(export, "read_teacher_card", lambda *where: card)
    call = {**SANA, "height": 32, "width": 32}
    how = {"sampler": Sampler(2), "pipeline_kwargs": call, "teacher": TeacherSource("org/teacher")}
    shown = CardContent(example_prompt="a fox")
    with quiet():
        copied = export_student(teacher, tmp_path / "copied", card=shown, **how)
        published = replace(shown, repo_id="me/small")
        folder = export_student(teacher, tmp_path / "copied", card=published, shared_components="referenced", **how)
        copied = export_student(teacher, tmp_path / "full", card=shown, **how)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"transformer", "scheduler"}
    assert client("push", folder, "--repo_id", "me/small")["code"] == 0
    text = (folder / "README.md").read_text()
    assert "Everything else comes from\n[org/teacher]" in text and "copies" not in text
    here = drawn_here(copied, "a fox")
    for image in strangers_images(hub, tmp_path, text, token=TOKEN):
        np.testing.assert_array_equal(image, here)
    words = ["--pretrained_model_name_or_path", "me/small", "--prompts", "a fox", "--output_dir", tmp_path / "samples"]
    assert client("generate", *words)["code"] == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "00000.png")), here)


def test_the_documentation_names_options_that_exist(client):
    text = (ROOT / "docs" / "publishing.md").read_text() + (ROOT / "README.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines() if line.startswith("flowdistill ")]
    assert {words[1] for words in commands} == {"export", "card", "push", "verify"}
    for _, command, *words in commands:
        known = client(command, "--help")["out"]
        assert all(word in known for word in words if word.startswith("--")), words


# ------------------------------------------------------------------------------------------------------- the real Hub


@pytest.mark.network
def test_the_same_on_the_real_hub(tmp_path):
    """Needs HF_TOKEN, of a token that can write. Makes a private repository and deletes it."""
    from huggingface_hub import HfApi

    from hf_flowdistill.hub.push import check_push, upload_student
    from hf_flowdistill.hub.verify import verify_repository

    repo_id = check_push("hf_flowdistill-test")
    call = {"max_sequence_length": 8, "height": 32, "width": 32}
    with quiet():
        folder = export_student(
            tiny_pipelines.stable_diffusion_3(),
            tmp_path / "student",
            Sampler(),
            pipeline_kwargs=call,
            card=CardContent(repo_id=repo_id),
        )
    try:
        first = upload_student(folder, repo_id, private=True)
        assert upload_student(folder, repo_id, private=True) == type(first)(first.url, first.commit, 0)
        assert verify_repository(repo_id, cache_dir=tmp_path / "cache").commit == first.commit
        here = drawn_here(folder, "a fox")
        done = subprocess.run(
            [sys.executable, "-c", snippet_of(folder)],
            cwd=tmp_path,
            env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
        )
        assert done.returncode == 0
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "image.png")), here)
    finally:
        HfApi().delete_repo(repo_id, missing_ok=True)


def snippet_of(folder) -> str:
    text = (folder / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    return re.sub(r'pipe\("[^"]*"', 'pipe("a fox"', snippet) + "image.save('image.png')\n"
