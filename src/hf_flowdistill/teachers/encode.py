# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Images to latents through the pipeline's own VAE, in the layout that its own code decodes.

Between a pipeline's sampler and its VAE lies code of its own: unpacking, unpatchifying, scaling, shifting. It is
learned from what the pipeline hands to `vae.decode`, and inverted.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from torch import Tensor

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.teachers.decoding import decode
from hf_flowdistill.teachers.finite import advice, is_finite
from hf_flowdistill.teachers.watch import undisturbed


LEVELS = 16  # told apart in one probe: few enough for bfloat16
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ImageEncoder:
    """Called with images, it returns their x0 latents. Learned by `learn_image_encoder`; see there.

    Element i of what `vae.decode` is given is scale[i] * latents[source[i]] + shift[i], all flattened.

    Attributes:
        vae: the pipeline's own. It may be moved to another device and back.
        mode: what the VAE is given: "RGB", or "RGBA" with an opaque fourth channel.
        height, width: of the images, in pixels.
        latent_shape: the contract's, without the batch dimension.
        vae_shape: of what `vae.decode` is given, without the batch dimension.
        source: [elements] in int64; a permutation.
        scale, shift: [elements] in float32, on the CPU like `source`.
    """

    vae: torch.nn.Module
    mode: str
    height: int
    width: int
    latent_shape: tuple[int, ...]
    vae_shape: tuple[int, ...]
    source: Tensor
    scale: Tensor
    shift: Tensor

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """The latents of RGB images of size (width, height): float32 on the CPU, [n, *latent_shape].

        The VAE's distribution is taken at its mode. No gradient; all images go through the VAE at once.

        Raises:
            ValueError: an image of another size or mode.
            UserError: the latents are not finite.
        """
        for image in images:
            if image.size != (self.width, self.height) or image.mode != "RGB":
                raise ValueError(f"expected RGB images of {self.width} x {self.height}, not {image.mode} {image.size}")
        pixels = torch.from_numpy(np.stack([image.convert(self.mode) for image in images])).permute(0, 3, 1, 2)
        weight = next(self.vae.parameters())
        # weights that are streamed take what they are given along, to where they compute
        device = "cpu" if weight.is_meta else weight.device
        pixels = (pixels.to(device, torch.float32) / 127.5 - 1).to(weight.dtype)
        if len(self.vae_shape) == 4:  # of a VAE for videos: one frame
            pixels = pixels.unsqueeze(2)
        with torch.no_grad():
            output = self.vae.encode(pixels)
        # autoencoders with a distribution, and those without
        encoded = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latent
        if encoded.shape[1:] != self.vae_shape:
            raise ValueError(f"the VAE makes {tuple(encoded.shape[1:])} of an image, and decodes {self.vae_shape}")
        if not is_finite(encoded):
            raise UserError(f"the VAE makes numbers that are not finite of an image{advice({'vae': self.vae})}.")
        return self.from_vae(encoded)

    def from_vae(self, encoded: Tensor) -> Tensor:
        """Latents as `vae.encode` gives them, [n, *vae_shape], in the contract's layout: float32 on the CPU."""
        standard = (encoded.detach().float().cpu().flatten(1) - self.shift) / self.scale
        latents = torch.empty_like(standard)
        latents[:, self.source] = standard
        return latents.reshape(-1, *self.latent_shape)


def learn_image_encoder(pipeline, contract) -> ImageEncoder:
    """How the images of `contract`'s size become its latents, learned from what the pipeline does with latents.

    Latents of all zeros, of all ones and with their own place written into them are decoded with the VAE switched off;
    so scale, shift and permutation of every element are known, and are then compared on random latents. It costs
    the encoding of an empty prompt or two, and of one image. The pipeline is left as it was.

    Raises:
        UserError: what lies between sampler and VAE is something else, images do not come out as the VAE's output
            in [-1, 1], there is no VAE, or it cannot encode.
    """
    name, vae = contract.pipeline_class, getattr(pipeline, "vae", None)
    if not (isinstance(vae, torch.nn.Module) and hasattr(vae, "decode") and hasattr(vae, "encode")):
        raise UserError(f"{name} has no VAE, so images cannot be turned into its latents: choose another teacher.")

    def refuse(reason):
        return UserError(f"images cannot be turned into latents of {name}: {reason}; choose another teacher.")

    elements = math.prod(contract.latent_shape)
    places = torch.arange(elements)
    digits = [places // LEVELS**i % LEVELS for i in range(max(1, math.ceil(math.log(elements, LEVELS))))]
    random = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    probes = [torch.zeros(elements), torch.ones(elements), random, *(digit / (LEVELS - 1) for digit in digits)]
    seen = _decoder_inputs(pipeline, contract, torch.stack(probes).reshape(-1, *contract.latent_shape), refuse)
    vae_shape, dtype = tuple(seen.shape[1:]), seen.dtype
    if math.prod(vae_shape) != elements or len(vae_shape) not in (3, 4):
        raise refuse(f"its VAE is given {vae_shape} for latents of {contract.latent_shape}")
    zeros, ones, random_seen, *digits_seen = seen.float().flatten(1)
    scale, shift = ones - zeros, zeros
    if not (scale.isfinite() & shift.isfinite() & (scale != 0)).all():
        raise refuse("its VAE is given something of which the latents are not all a part")
    levels = [((digit - shift) / scale * (LEVELS - 1)).round().long() for digit in digits_seen]
    source = sum(level * LEVELS**i for i, level in enumerate(levels))
    if not torch.equal(source.sort().values, places):
        raise refuse("its VAE is given mixtures of several latents")
    error = (scale * random[source] + shift - random_seen).abs().max() / random_seen.abs().max()
    if not error < TOLERANCE.get(dtype, 1e-4):
        raise refuse(f"its VAE is not given a scaled and shifted permutation of them (relative error {error:.1e})")
    for mode in ("RGB", "RGBA"):
        layout = contract.latent_shape, vae_shape, source, scale, shift
        encoder = ImageEncoder(vae, mode, contract.height, contract.width, *layout)
        try:
            with undisturbed(pipeline):
                encoder([Image.new("RGB", (contract.width, contract.height), "grey")])
            return encoder
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
    raise refuse(f"its VAE does not encode one ({reason})")


def _decoder_inputs(pipeline, contract, latents: Tensor, refuse) -> Tensor:
    """What `vae.decode` would be given for `latents`, on the CPU. It is told to return one and the same picture, whose
    way out of the pipeline is checked too."""
    vae, seen = pipeline.vae, []
    signature = inspect.signature(vae.decode)
    picture = torch.rand(3, contract.height, contract.width, generator=torch.Generator().manual_seed(1))

    def decode_nothing(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        given = next(iter(bound.arguments.values()))
        seen.append(given.detach().cpu())
        sample = (2 * picture - 1).to(given).expand(len(given), *picture.shape)
        sample = sample.unsqueeze(2) if given.ndim == 5 else sample
        return DecoderOutput(sample) if bound.arguments.get("return_dict", True) else (sample,)

    own = vae.__dict__.get("decode")
    vae.decode = decode_nothing
    try:
        images = decode(pipeline, contract, latents, "pt")
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise refuse(f"the pipeline fails with a VAE that is switched off ({first_line(error)})") from error
    finally:
        if own is None:
            del vae.decode
        else:
            vae.decode = own
    given = torch.cat(seen) if len({part.shape[1:] for part in seen}) == 1 else torch.empty(0)
    if len(given) != len(latents):
        raise refuse("its VAE is not called once for every image")
    error = (images.float().cpu() - picture).abs().max()
    if not error < TOLERANCE.get(given.dtype, 1e-4):
        raise refuse("its VAE's output is not the image in [-1, 1]")
    return given
