# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a method is: its arguments, which networks take turns, what a turn draws, its loss, what it records.

A method knows nothing of launchers, devices, checkpoints or export; `training.run` gives all of them to every method,
and the loop is in the method's script.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from hf_flowdistill.flow.draws import sample_noise
from hf_flowdistill.flow.rollout import Sampler, rollout
from hf_flowdistill.methods.phases import sampler_of
from hf_flowdistill.networks.adapters import merged


class Size(NamedTuple):
    """One image size: the teacher's contract there, and the conditioning that its transformer is fed there.

    Attributes:
        conditional: of the distinct training prompts, one row each, on the CPU.
        unconditional: of the negative prompt, one row, on the device.
        validation: of the validation prompts, one row each, on the CPU; None without any.
    """

    contract: Any
    conditional: Any
    unconditional: Any
    validation: Any = None


@dataclass(frozen=True)
class Samples:
    """Which samples of a training these are, and with that everything random about them: a function of the seed and
    their places, and not of how many processes or micro-batches there are.

    Attributes:
        size: of the images.
        prompts: `data.stream.PromptStream`.
        pairs: `data.images.ImagePairs`, or None where the method takes no images.
        indices: their places in the global batch of the update.
        images_seen: before the update; `images_seen + index` is the place in the training.
        images_per_update: of all processes together.
        number: of the micro-batch in the update.
    """

    seed: int
    step: int
    images_seen: int
    images_per_update: int
    indices: range
    number: int
    size: Size
    prompts: Any
    pairs: Any
    device: Any

    @property
    def positions(self) -> list[int]:
        return [self.images_seen + index for index in self.indices]

    def noise(self, purpose: str) -> Tensor:
        """Standard normal noise of the latents' shape, [B, *latent_shape] in float32."""
        return self._draw(self.size.contract.latent_shape, purpose)

    def numbers(self, purpose: str) -> Tensor:
        """Standard normal numbers, [B] in float32."""
        return self._draw((), purpose)

    def conditional(self, purpose: str):
        """Conditioning of their prompts, B rows on the device; each `purpose` has an order of its own."""
        return self.rows(self.prompts.rows(purpose, self.positions))

    def rows(self, rows: Tensor):
        """Conditioning of these rows of the distinct prompts, on the device."""
        return self.size.conditional[rows].to(self.device)

    def _draw(self, shape, purpose: str) -> Tensor:
        return sample_noise(
            shape, seed=self.seed, step=self.step, purpose=purpose, indices=self.indices, device=self.device
        )


@dataclass(frozen=True)
class Update:
    """One update of a training.

    Attributes:
        turns: name of the network -> its turn, in their order. A turn is (networks, contract, batch, config) ->
            (loss, metrics): a scalar, whose gradient reaches that network alone, and a dictionary of detached scalars.
        draw: (name of the network, `Samples`) -> the batch of its turn.
        config: for the turns.
        record: what the update's record says besides the metrics, as JSON.
    """

    turns: dict[str, Callable]
    draw: Callable[[str, Samples], Any]
    config: Any = None
    record: dict = field(default_factory=dict)


class Method:
    """What every method has; a method overrides what is its own, `update` at least.

    Attributes:
        trains: the names of the networks that it trains, of "generator" and "fake_score".
        takes_images: its prompts are the captions of images, `Samples.pairs`.
        progress: formats of what the progress bar shows, the most telling first: one is left out where the record
            lacks one of its names, or the bar the room.
    """

    trains: tuple[str, ...] = ("generator", "fake_score")
    takes_images = False
    progress: tuple[str, ...] = ()

    def __init__(self, args):
        self.args = args

    def settle(self, pipeline, contract) -> None:
        """Settle what depends on the teacher, once its contract is known and before anything long; the pipeline can
        run.

        Raises:
            UserError: this teacher cannot be distilled as the arguments say.
        """

    @property
    def used(self) -> dict:
        """Arguments as they are used, where that is not as they were given."""
        return {}

    @property
    def guidance(self) -> dict:
        """How the teacher is guided where it is sampled to be looked at: arguments of `Contract.guided_velocity`."""
        return {"scale": 1.0}

    def sampler(self, images_seen: int) -> Sampler:
        """The student's, in the update after `images_seen` images; see `Run.sampler` for the one that is published."""
        return sampler_of(vars(self.args), images_seen)

    def generate(self, network, contract, conditional, noises: Callable[[int], Tensor], sampler: Sampler) -> Tensor:
        """The student's x0 for B prompts, [B, *latent_shape], as its published pipeline with `sampler` makes it."""
        return generate_x0(network, contract, conditional, noises, **vars(sampler))

    def equip(self, networks, place: Callable | None = None) -> None:
        """Add to the networks, once they are there and have their first weights, what they have beyond the teacher.

        Args:
            place: (network, module that it is to have too) -> the module, where it is to be.
        """

    def published(self, network, predict: Callable):
        """The transformer, of the teacher's class, that is exported of the averaged generator.

        Args:
            predict: calls a transformer once, at sigma 1.
        """
        return merged(network)

    def summarize(self, turn: str, metrics: dict[str, float]) -> dict[str, float]:
        """What is recorded of a turn's metrics, which are means over the whole update, the same on all processes."""
        return metrics

    def measure(self, networks, samples: Samples) -> dict[str, float]:
        """What the generator is shown beside in every record, measured once for each size before training."""
        return {}

    def update(self, step: int, images_seen: int) -> Update:
        """The update number `step` (from 0), after `images_seen` images."""
        raise NotImplementedError


def generate_x0(
    generator, contract, conditional, noises, *, k=None, num_steps=4, noise_type="fresh", sigmas=None
) -> Tensor:
    """x0 of the unguided few-step generator at step k (None = the last), [B, ...]; gradient through step k only."""
    conditional = conditional.with_embedded_guidance(1.0)

    def velocity_fn(x_t, sigma):
        return contract.velocity(generator, x_t, sigma, conditional)

    return rollout(velocity_fn, noises, k=k, num_steps=num_steps, noise_type=noise_type, sigmas=sigmas)
