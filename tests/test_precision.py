# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Networks in bfloat16 and under autocast: what is cast, how the time is fed, what of it the network sees."""

import copy
from contextlib import nullcontext

import pytest
import torch
from teacher_cases import TEACHERS, learned, learned_in_bfloat16
from training_helpers import run_command

from hf_flowdistill.networks.roles import Networks
from hf_flowdistill.teachers import encode_prompts, learn_low_precision
from hf_flowdistill.teachers.inference import relative_error
from hf_flowdistill.teachers.precision import ROUNDINGS, cast, find_rounding, floating_dtype, seen_times, snap
from hf_flowdistill.training.ema import EMA


AUTOCAST = torch.autocast("cpu", torch.bfloat16)
# Class -> what it makes of its time under autocast, and with weights in bfloat16.
TIMES = {
    "sd3": (None, None),
    "flux": ("1000 times in bfloat16", "1000 times in bfloat16"),
    "chroma": ("1000 times in bfloat16", "1000 times in bfloat16"),
    "qwen image": ("bfloat16", "bfloat16"),
    "ovis image": ("1000 times in bfloat16", "1000 times in bfloat16"),
    "longcat image": ("1000 times in bfloat16", "1000 times in bfloat16"),
    "bria": ("bfloat16", "bfloat16"),
    "flux2": (None, "1000 times in bfloat16"),
    "z image": (None, None),
}


def dtypes(network):
    return {name: tensor.dtype for name, tensor in [*network.named_parameters(), *network.named_buffers()]}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_network_is_cast_as_diffusers_loads_it(name):
    """Tables of frequencies stay, and so does what the class keeps in float32; nothing else does."""
    made, loaded = copy.deepcopy(learned(name).pipeline.transformer), learned_in_bfloat16(name).pipeline.transformer
    assert dtypes(cast(made, torch.bfloat16)) == dtypes(loaded)
    tables = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, tables[key]) for key, buffer in made.named_buffers())
    assert floating_dtype(made) == torch.bfloat16


@pytest.mark.parametrize("name", TEACHERS)
def test_the_average_of_a_bfloat16_network_equals_its_own_export(name, tmp_path):
    case = learned(name)
    teacher = copy.deepcopy(case.pipeline.transformer)
    networks = Networks.from_teacher(teacher, torch.bfloat16)
    average = EMA(networks.generator).model
    average.save_pretrained(tmp_path)
    exported = type(average).from_pretrained(tmp_path)
    conditional, _ = encode_prompts(case.pipeline, case.contract, ["a red ball"])
    x_t = torch.randn(2, *case.contract.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [
            case.contract.velocity(one, x_t, torch.tensor([0.98, 0.6]), conditional) for one in (average, exported)
        ]
    assert torch.equal(*found)


def precise(case, sigma, x_t, conditional):
    with torch.no_grad():
        return case.contract.velocity(case.pipeline.transformer, x_t, sigma, conditional)


def low(name, autocast):
    """(contract, network, context) of a class under autocast, or with weights in bfloat16."""
    case, context = learned(name), AUTOCAST if autocast else nullcontext()
    network = case.pipeline.transformer if autocast else cast(copy.deepcopy(case.pipeline.transformer), torch.bfloat16)
    with context:
        return learn_low_precision(case.pipeline, case.contract, network), network, context


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", TIMES)
def test_a_velocity_is_of_the_time_that_the_network_really_saw(name, autocast):
    """At a sigma as drawn; and no two different sigmas are one time for it."""
    case = learned(name)
    contract, network, context = low(name, autocast)
    assert contract.time_rounding == TIMES[name][not autocast]
    assert (contract.time_rounding or "none") in contract.describe()
    conditional, _ = encode_prompts(case.pipeline, case.contract, ["a red ball"])
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(8, generator=generator) + 0.7).sigmoid()
    sigma = contract.snap(drawn)
    assert (sigma - drawn).abs().max() < 0.005 and ((0 < sigma) & (sigma < 1)).all()
    x_t = torch.randn(1, *contract.latent_shape, generator=generator).expand(8, *contract.latent_shape)
    with torch.no_grad(), context:
        found = contract.velocity(network, x_t, sigma, conditional)
    rest = 0.05 if name == "flux" else 0.01  # of other rounding; at the sigmas as drawn it is up to .25
    assert relative_error(found, precise(case, sigma, x_t, conditional)) < rest

    times = seen_by(network, lambda: contract.velocity(network, x_t, sigma, conditional), context)
    if times is not None:
        largest = contract.time(torch.ones(1)).item()
        torch.testing.assert_close(times / times.max() * sigma.max(), sigma, rtol=1e-5, atol=1e-6)
        assert largest > 0
    distinct = contract.snap(torch.linspace(0.05, 0.98, 60)).unique()
    with torch.no_grad(), context:
        outputs = [contract.velocity(network, x_t[:1], one[None], conditional) for one in distinct]
    assert not any(torch.equal(one, other) for one, other in zip(outputs, outputs[1:]))


def seen_by(network, run, context):
    """The numbers that reach the network's own sinusoid of the time, if it has one of diffusers' module."""
    seen = []
    modules = [module for module in network.modules() if type(module).__name__ == "Timesteps"]
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0].float())) for module in modules]
    with torch.no_grad(), context:
        run()
    for hook in hooks:
        hook.remove()
    return seen[0] if seen else None


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_grid_of_a_rounding(rounding):
    levels = seen_times(rounding, 0.0, 1.0)
    assert torch.equal(ROUNDINGS[rounding](levels), levels) and (levels.diff() > 0).all()
    inner = levels[levels > 0.01]
    assert 300 < len(inner) < 1100 and inner.diff().max() < 0.0079
    values = torch.tensor([0.3, 0.977, 1e-9, 1.0])
    nearest = [levels[(levels - value).abs().argmin()] for value in values]
    assert torch.equal(snap(levels, values), torch.stack(nearest))


@pytest.mark.parametrize("lowest, highest", [(0.0, 1.0), (0.0, 1000.0), (-1.0, 0.0)])
@pytest.mark.parametrize("rounding", [None, *ROUNDINGS])
def test_a_rounding_is_found(rounding, lowest, highest):
    """Of a network that is its time; and nothing of one that knows none."""
    see = ROUNDINGS.get(rounding, lambda time: time)

    def differ(one, other):
        return bool(see(torch.tensor(one)) != see(torch.tensor(other)))

    assert find_rounding(differ, lowest, highest) == rounding
    assert find_rounding(lambda one, other: False, lowest, highest) is None


def test_in_float32_nothing_is_drawn_elsewhere():
    case = learned("flux")
    contract = learn_low_precision(case.pipeline, case.contract)
    sigma = torch.rand(100)
    assert contract.time_rounding is None and contract.snap(sigma) is sigma


def test_a_class_that_computes_in_the_dtype_of_its_time_is_given_its_own():
    """HunyuanImage: float32 times end in an error of its layers."""
    for name in ("hunyuan image", "hunyuan image, distilled guidance"):
        contract, network, _ = low(name, autocast=False)
        assert contract.time_dtype == torch.bfloat16
        conditional, _ = encode_prompts(learned(name).pipeline, contract, ["a red ball"])
        x_t = torch.randn(1, *contract.latent_shape)
        with torch.no_grad():
            assert contract.velocity(network, x_t, torch.tensor([0.5]), conditional).isfinite().all()


SHARDED = """
import copy, sys
import torch
from teacher_cases import learned_in_bfloat16
from hf_flowdistill.teachers import encode_prompts
from hf_flowdistill.training.ema import EMA
from hf_flowdistill.training.sharding import Sharding

case = learned_in_bfloat16(sys.argv[1])
whole = copy.deepcopy(case.pipeline.transformer).requires_grad_(True)
sharding = Sharding("full", "cpu")
teacher = sharding.shard(copy.deepcopy(whole)).requires_grad_(False)
generator = sharding.copy(teacher, torch.bfloat16)
average = EMA(generator, 1, copy=sharding.copy)
x_t = torch.randn(1, *case.contract.latent_shape, generator=torch.Generator().manual_seed(0))
words = encode_prompts(case.pipeline, case.contract, ["a red ball"])[0]
found, expected = (case.contract.velocity(n, x_t, torch.tensor([0.7]), words) for n in (generator, whole))
assert torch.equal(found, expected)
found.square().mean().backward()
expected.square().mean().backward()
dtypes = set()
for (name, sharded), parameter in zip(generator.named_parameters(), whole.parameters(), strict=True):
    dtypes.add(parameter.dtype)
    if parameter.grad is not None:
        assert sharded.dtype == parameter.dtype and torch.equal(sharded.grad.full_tensor(), parameter.grad), name
assert dtypes == {torch.float32, torch.bfloat16}
average.update(generator, batch_size=1, images_seen=100)
weights = sharding.gather(average.model).state_dict()
assert all(tensor.dtype == torch.float32 for tensor in weights.values() if tensor.is_floating_point())
assert weights.keys() == whole.state_dict().keys()
"""


@pytest.mark.parametrize("name", ["krea2", "kandinsky5"])
def test_shards_of_a_class_that_keeps_weights_in_float32(name):
    """Their values, gradients and average are those of the network that is whole."""
    run_command("-c", SHARDED, name)
