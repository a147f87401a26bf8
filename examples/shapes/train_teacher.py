# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Train the shapes teacher from nothing: autoencoder, feature network for FID, then transformer and text encoders.

    OMP_NUM_THREADS=1 python examples/shapes/train_teacher.py --output_dir examples/shapes/teacher

Every stage is kept under `--work_dir` and skipped when it is already there; the transformer stage resumes. With
`--init_from` it starts from the networks of a shapes pipeline. features.safetensors goes from `--work_dir` to this
folder by hand, since FIDs taken with another feature network cannot be compared. Under torchrun the transformer stage
shares every step among its processes.
"""

import argparse
import os
from pathlib import Path

from arguments import add_fit_arguments


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="examples/shapes/teacher", help="where the pipeline is saved")
    parser.add_argument("--work_dir", default="runs/shapes-teacher", help="where unfinished stages are kept")
    parser.add_argument("--init_from", help="a shapes pipeline whose networks the transformer stage starts from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128, help="transformer width, a multiple of 32")
    parser.add_argument("--num_layers", type=int, default=6, help="transformer blocks")
    parser.add_argument("--vae_steps", type=int, default=3600, help="autoencoder steps of batch 16")
    parser.add_argument(
        "--kl_weight", type=float, default=2e-6, help="weight of the autoencoder's KL term (nats per image)"
    )
    parser.add_argument("--feature_steps", type=int, default=2500, help="feature network steps of batch 64")
    parser.add_argument("--num_renders", type=int, default=120_000, help="renders the transformer learns from")
    add_fit_arguments(parser, steps=40_000, batch_size=64)
    parser.add_argument("--stages", nargs="+", default=["vae", "features", "transformer"])
    return parser.parse_args()


def main():
    args = parse_args()

    import torch  # what computes is imported here, since it takes seconds
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

    from features import FeatureNetwork, train_features
    from fitting import save
    from sd3_teacher import build_pipeline, train_transformer, train_vae

    work = Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    pipeline = build_pipeline(args)
    if args.init_from:
        pipeline = StableDiffusion3Pipeline.from_pretrained(args.init_from)
    elif not (work / "vae").exists() and "vae" in args.stages:
        train_vae(pipeline.vae, args)
        pipeline.vae.save_pretrained(work / "vae")
    if "features" in args.stages and not (work / "features.safetensors").exists():
        train_features(FeatureNetwork(), args.feature_steps, args.seed).save(work / "features.safetensors")
    if "transformer" in args.stages:
        if not args.init_from:
            pipeline.register_modules(vae=AutoencoderKL.from_pretrained(work / "vae").eval())
        if "RANK" in os.environ:
            torch.distributed.init_process_group("gloo")
        train_transformer(pipeline, args)
        if int(os.environ.get("RANK", 0)) == 0:
            save(pipeline, args.output_dir)
            # half the size to download; from_pretrained loads it in float32 all the same
            pipeline.transformer.half().save_pretrained(Path(args.output_dir) / "transformer")


if __name__ == "__main__":
    main()
