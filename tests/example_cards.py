# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The cards of model_cards/examples, one for each teacher and size of the paper, from its recipe and nothing else.

PYTHONPATH=src:tests:examples python tests/example_cards.py
"""

from pathlib import Path

from score_distillation import train_sid_dit

from hf_flowdistill.hub.card import render_card
from hf_flowdistill.hub.secrets import without_secrets
from hf_flowdistill.training.fit_arguments import settle


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "model_cards" / "examples"
NOTE = """> An example: what the export writes for a student of this teacher before anything is measured.
> No such student has been trained yet.

"""
GUIDANCE_OFF = {
    "StableDiffusion3Pipeline": {"guidance_scale": 1.0},
    "SanaPipeline": {"guidance_scale": 1.0},
    "FluxPipeline": {"true_cfg_scale": 1.0, "guidance_scale": 1.0},
}
# What the teachers' cards on the Hub say in their metadata: those of SANA name no licence there.
STABILITY = {"license": "other", "license_name": "stabilityai-ai-community", "gated": "auto"}
STABILITY |= {"license_link": "LICENSE.md"}
TEACHER_CARDS = {
    "stabilityai/stable-diffusion-3-medium-diffusers": {
        **STABILITY,
        "license_name": "stabilityai-nc-research-community",
        "license_link": "LICENSE",
    },
    "stabilityai/stable-diffusion-3.5-medium": STABILITY,
    "stabilityai/stable-diffusion-3.5-large": STABILITY,
    "black-forest-labs/FLUX.1-dev": {**STABILITY, "license_name": "flux-1-dev-non-commercial-license"},
}
STUDENTS = {  # recipe -> class of the teacher's pipeline
    "sana_0.6b_512_amp": "SanaPipeline",
    "sana_1.6b_512_amp": "SanaPipeline",
    "sana_sprint_0.6b_1024_amp": "SanaPipeline",
    "sana_sprint_1.6b_1024_amp": "SanaPipeline",
    "sd3_medium_bf16": "StableDiffusion3Pipeline",
    "sd3.5_medium_bf16": "StableDiffusion3Pipeline",
    "sd3.5_large_bf16": "StableDiffusion3Pipeline",
    "flux.1_dev_512_bf16": "FluxPipeline",
    "flux.1_dev_1024_bf16": "FluxPipeline",
}


def example_card(recipe) -> str:
    args = train_sid_dit.parse_args([f"--recipe={recipe}", "--prompt_file=prompts.txt", "--report_to=none"])
    settle(args, 8)
    teacher, pipeline_class = args.pretrained_model_name_or_path, STUDENTS[recipe]
    carried = dict(TEACHER_CARDS.get(teacher, {}))
    if "license_link" in carried:
        carried["license_link"] = f"https://huggingface.co/{teacher}/blob/main/{carried['license_link']}"
    size = {"height": args.height, "width": args.width}
    name = recipe.rpartition("_")[0].replace("_", "-")
    student = {
        "pipeline_class": pipeline_class,
        "num_steps": args.num_steps,
        "noise_type": args.noise_type,
        "call_defaults": {"num_inference_steps": args.num_steps, **GUIDANCE_OFF[pipeline_class], **size},
        "absent_components": [],
        "dtype": "float32",
        "teacher": teacher,
        "base_model": teacher,
        "teacher_card": carried,
        "method": "sid",
        "example_prompt": "a photograph of a red fox in the snow",
    }
    settings = {"student": student, "training_args": without_secrets(vars(args))}
    card = render_card(settings, {"rows": []}, location=f"your-name/{name}-4-steps")
    metadata, title = card.split("\n---\n\n", 1)
    return f"{metadata}\n---\n\n{NOTE}{title}"


if __name__ == "__main__":
    EXAMPLES.mkdir(exist_ok=True)
    for recipe in STUDENTS:
        (EXAMPLES / f"{recipe.rpartition('_')[0]}.md").write_text(example_card(recipe), encoding="utf-8")
