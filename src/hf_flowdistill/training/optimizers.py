# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Optimizers, learning rates that count images, and one guarded update."""

import functools
import math

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam

from hf_flowdistill.flow.draws import half_words
from hf_flowdistill.training.distributed import all_ranks_agree, average_gradients, whole
from hf_flowdistill.training.names import ROUNDINGS


def build_optimizer(
    network,
    *,
    betas=(0.0, 0.999),
    epsilon: float = 1e-8,
    rounding: str = ROUNDINGS[0],
    use_8bit_adam: bool = False,
    seed: int = 0,
):
    """Adam as in SiD-DiT, Tables 3 and 4: beta1 0, beta2 0.999, no weight decay.

    Args:
        rounding: of bfloat16 parameters; float32 ones are not rounded. "stochastic": the update is computed in
            float32, with float32 moments, and rounded up or down with the probability that makes it right on average.
            "nearest" is the paper's BF16, all in bfloat16: an update below half the distance of neighbouring bfloat16
            numbers, 1/512 to 1/256 of the weight, is lost, however often it comes.
        use_8bit_adam: bitsandbytes' Adam, with moments of 8 bits.
        seed: of stochastic rounding.
    """
    rounds = rounding == "stochastic" and any(p.dtype == torch.bfloat16 for p in network.parameters())
    settings = {"betas": betas, "eps": epsilon} | ({"seed": seed} if rounds else {})
    if use_8bit_adam:
        import bitsandbytes

        kind = _rounded_adam8bit() if rounds else bitsandbytes.optim.Adam8bit
    else:
        kind = RoundedAdam if rounds else torch.optim.Adam
    return kind(network.parameters(), **settings)


class RoundedAdam(torch.optim.Adam):
    """torch's Adam in float32 for parameters of bfloat16, which are rounded stochastically.

    The numbers that round are those of (`seed`, step, number of the parameter, place of its shard): a resumed run
    draws the same, and so do processes with copies of one parameter, which therefore stay copies.
    """

    def __init__(self, parameters, *, seed: int, **settings):
        super().__init__(parameters, **settings)
        self.seed = seed

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            beta1, beta2 = group["betas"]
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for moment in ("exp_avg", "exp_avg_sq"):
                        state[moment] = torch.zeros_like(parameter, dtype=torch.float32)
                weights, moments = parameter.float(), ([state["exp_avg"]], [state["exp_avg_sq"]])
                adam(
                    [weights],
                    [parameter.grad.float()],
                    *moments,
                    [],
                    [state["step"]],
                    beta1=beta1,
                    beta2=beta2,
                    **settings,
                )
                if parameter.dtype == torch.bfloat16:  # float32 weights are the parameter itself
                    round_stochastically(weights, parameter, self.seed, int(state["step"]), number)

    def load_state_dict(self, state_dict):
        """As torch's, which would make the moments bfloat16."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, saved in state_dict["state"].items():
            for moment in ("exp_avg", "exp_avg_sq"):
                self.state[parameters[number]][moment] = saved[moment].to(parameters[number].device, copy=True)


@functools.cache
def _rounded_adam8bit():
    """A class, made where bitsandbytes is: its Adam8bit for parameters of bfloat16, rounded as in `RoundedAdam`."""
    from bitsandbytes.optim import Adam8bit

    class RoundedAdam8bit(Adam8bit):
        def __init__(self, parameters, *, seed: int, **settings):
            super().__init__(parameters, **settings)
            self.seed = seed

        @torch.no_grad()
        def update_step(self, group, p, gindex, pindex):
            if p.dtype != torch.bfloat16:
                return super().update_step(group, p, gindex, pindex)
            kept, gradient = p.data, p.grad
            p.grad = None  # a gradient has the dtype of its parameter
            p.data = kept.float()
            p.grad = gradient.float()
            super().update_step(group, p, gindex, pindex)
            weights, p.grad = p.data, None
            p.data, p.grad = kept, gradient
            round_stochastically(weights, p, self.seed, self.state[p]["step"], pindex)

    return RoundedAdam8bit


def round_stochastically(weights: torch.Tensor, parameter: torch.Tensor, *key) -> None:
    """Write `weights`, float32 and finite, into `parameter`, bfloat16, each rounded to one of its two neighbours.

    A weight that lies at a share s of the way from one to the next goes to the next with probability s, so the mean
    over roundings is the weight; a weight that is a bfloat16 number stays. The random numbers are those of `key` and,
    where the parameter is sharded, of the shard's place. `weights` is used up.
    """
    if isinstance(parameter, DTensor):
        places = zip(parameter.placements, parameter.device_mesh.get_coordinate())
        key = (*key, *(place for placement, place in places if placement.is_shard()))
        weights, parameter = weights.to_local(), parameter.to_local()
    bits = weights.view(torch.int32)
    # bfloat16 is the upper half of a float32: what the lower half is short of a carry is up to chance
    bits += half_words(bits.shape, bits.device, "rounding", *key)
    bits &= -(2**16)
    parameter.copy_(weights)


def learning_rate_factor(schedule: str, images_seen: int, *, batch_size: int, warmup: int, end: int) -> float:
    """What the learning rate of an update with `batch_size` images is multiplied by, in [0, 1], after `images_seen`.

    It rises linearly over `warmup` images, this update's included, so that no update is wasted on a rate of 0; then
    `constant` stays, `linear` and `cosine` fall to 0 at `end`. It depends on nothing else, so there is no scheduler
    state to save.
    """
    if images_seen < warmup:
        return min(1.0, (images_seen + batch_size) / warmup)
    progress = min(1.0, (images_seen - warmup) / max(1, end - warmup))
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]


def apply_update(optimizer, *, loss: float, learning_rate: float, max_grad_norm: float | None = None):
    """Average the gradients over processes, step if everything is finite, and clear the gradients.

    The processes decide together, before anyone steps: a non-finite loss or gradient on one of them skips the update
    on all. `loss` is the value that was differentiated. Returns (whether the step was taken, total gradient norm).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    average_gradients(parameters)
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = whole(total_norm)
    finite = all_ranks_agree(math.isfinite(loss) and bool(norm.isfinite()), norm.device)
    if finite:
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, total_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite, norm.item()
