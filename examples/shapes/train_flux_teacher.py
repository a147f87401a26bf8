# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A second shapes teacher, of the classes of FLUX.1-dev, which learns from the first as that one did from FLUX.1-pro.

    OMP_NUM_THREADS=1 python examples/shapes/train_flux_teacher.py --output_dir runs/flux-teacher

Its transformer follows the guided velocity of the first teacher, with the guidance scale as an input: one pass a step,
where the first needs two. Rotary positions stand in the place of added ones, a T5 reads the prompt, single blocks
follow the double ones, and latents have 16 channels and are packed two by two. Weights start from the first teacher's
where the two networks have the same. Unfinished stages are kept under --work_dir, and the transformer stage resumes.
"""

import argparse
from pathlib import Path

from arguments import HERE, add_fit_arguments
from hf_flowdistill.cli import silence_libraries


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/flux-teacher", help="where the pipeline is saved")
    parser.add_argument("--work_dir", default="runs/flux-teacher-stages", help="where unfinished stages are kept")
    parser.add_argument("--teacher", default=str(HERE / "teacher"), help="the first shapes teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_single_layers", type=int, default=2, help="single transformer blocks")
    parser.add_argument("--vae_steps", type=int, default=1500, help="autoencoder steps of batch 16")
    parser.add_argument("--text_steps", type=int, default=1500, help="steps of the T5 alone, of batch 64")
    parser.add_argument("--num_renders", type=int, default=40_000, help="renders the transformer learns from")
    parser.add_argument(
        "--relation_share", type=float, default=0.45, help="of a batch: prompts that relate two objects, learned last"
    )
    add_fit_arguments(parser, steps=13_000, batch_size=32)
    return parser.parse_args()


def main():
    args = parse_args()

    from diffusers import AutoencoderKL, StableDiffusion3Pipeline  # what computes is imported here: it takes seconds

    from fitting import save
    from flux_teacher import build_pipeline, start_from, train_transformer, train_vae

    silence_libraries()
    work = Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    source = StableDiffusion3Pipeline.from_pretrained(args.teacher)
    pipeline = build_pipeline(source, args)
    if not (work / "vae").exists():
        train_vae(pipeline.vae, source, args)
        pipeline.vae.save_pretrained(work / "vae")
    pipeline.register_modules(vae=AutoencoderKL.from_pretrained(work / "vae").eval())
    start_from(pipeline.transformer, source)
    train_transformer(pipeline, source, args)
    save(pipeline, args.output_dir)


if __name__ == "__main__":
    main()
