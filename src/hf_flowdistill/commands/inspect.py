# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Print how a pipeline talks to its transformer, or why it cannot be a teacher."""

from hf_flowdistill.cli import (
    ArgumentParser,
    add_call_arguments,
    add_origin_arguments,
    check_model,
    silence_libraries,
)
from hf_flowdistill.networks.arguments import add_device_argument, check_device


def main(input_args):
    parser = ArgumentParser(prog="flowdistill inspect", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL_OR_PATH", help="a diffusers pipeline: a Hub id or a folder")
    add_origin_arguments(add)
    add("--variant", metavar="NAME", help="variant of the weight files, e.g. fp16")
    add_call_arguments(add)
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    add_device_argument(add)
    args = parser.parse_args(input_args)
    check_model(args.model)

    import torch  # what computes is imported here, since it takes seconds

    from hf_flowdistill.networks.loading import load_pipeline
    from hf_flowdistill.planning.describe import describe_conditioning, describe_networks
    from hf_flowdistill.teachers import encode_prompts, learn_contract, learn_low_precision
    from hf_flowdistill.training.initial_weights import check_no_student

    device = check_device(args.device)
    silence_libraries()
    origin = {"revision": args.revision, "cache_dir": args.cache_dir}
    check_no_student(args.model, **origin)
    how = {"variant": args.variant, "dtype": getattr(torch, args.dtype)}
    pipeline = load_pipeline(args.model, **how, **origin).to(device)
    resolution = args.resolution or own_resolution(pipeline)
    contract = learn_contract(
        pipeline,
        height=args.height or resolution,
        width=args.width or resolution,
        pipeline_kwargs=args.pipeline_kwargs,
    )
    contract = learn_low_precision(pipeline, contract)
    rows, _ = encode_prompts(pipeline, contract, ["a cat"])
    kept = {name: (tuple(row.shape[1:]), row.numel() * row.element_size()) for name, row in rows.tensors.items()}
    print("\n".join([contract.describe(), *describe_networks(pipeline), describe_conditioning(kept)]))


def own_resolution(pipeline) -> int:
    """The size in pixels that the pipeline draws by itself, 1024 if it does not say."""
    latent = getattr(pipeline, "default_sample_size", None) or pipeline.transformer.config.get("sample_size")
    factor = getattr(pipeline, "vae_scale_factor", None)
    return latent * factor if isinstance(latent, int) and isinstance(factor, int) else 1024
