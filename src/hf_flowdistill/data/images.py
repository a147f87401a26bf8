# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Text-image pairs as the adversarial stage uses them: latents on the disk, encoded part by part, and their captions.

A part is the next images of the data that can be used, `images_per_part` of them (rounded up to whole shards) or all.
How a training script uses them:

    encoder = learn_image_encoder(pipeline, contract)                 # teachers.encode; UserError where it cannot be
    pairs = ImagePairs(
        folder, open_dataset(...), encoder, size=(contract.height, contract.width), seed=seed,
        images_per_part=None or N, rank=..., world_size=..., wait=accelerator.wait_for_everyone,
        state=run.state.get("images"),                                # of a checkpoint, or None
    )
    if pairs.move_to(images_seen):                                    # before an update, on every process: True if the
        conditional = cached_conditioning(                            # part is another than before. It may encode, so
            pairs.folder / "conditioning", encoder_key(...), pairs.captions, encode, ...  # VAE and text encoders have
        )                                                             # to be on the device: ask `pairs.is_over(seen)`.
        run.state["images"] = pairs.state                             # JSON; what a checkpoint has to keep

    rows = pairs.rows([images_seen + i for i in indices])             # LongTensor [n], a function of seed and position
    x0, real = pairs.latents(rows), conditional[rows]                 # float32 on the CPU [n, *contract.latent_shape]

`pairs.captions[row]` is the caption of a row. All positions of one update are of the part that `move_to` chose for its
first. `pairs.folder` is deleted with its part.
"""
