# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One frozen transformer in several roles: as it is, or with one of its LoRA adapters on."""

import contextlib
import copy
import inspect
import logging
import re
import warnings
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from hf_flowdistill.flow.draws import normal
from hf_flowdistill.networks.flow_map import attach_as, flow_map_of
from hf_flowdistill.networks.quantized_sizes import QuantizedSizes
from hf_flowdistill.teachers.precision import floating_dtype


LORA_FILE = "pytorch_lora_weights.safetensors"


class SharedBase:
    """A frozen transformer with LoRA adapters (float32), of which at most one is on; outside of `role` none is.

    Args:
        transformer: a diffusers model; it is frozen and given peft's layers in place.
        targets: full names of its linear layers that get an adapter.
        rank, alpha: of all adapters; what an adapter adds is scaled by alpha / rank.
        seed: of the adapters' first matrices. The second ones are zero, so every role starts as the transformer is.
        quantized: full names of its linear layers that `quantize` has replaced.
    """

    def __init__(self, transformer, targets: list[str], *, rank: int, alpha: float, seed: int = 0, quantized=()):
        self.transformer = transformer.requires_grad_(False)
        self.dtype = floating_dtype(transformer)
        self.targets, self.rank, self.alpha, self.seed = targets, rank, alpha, seed
        self.linear_layers = [*dict.fromkeys([*targets, *quantized])]  # those that are not plain any more
        self.layers: dict[str, torch.nn.Module] = {}
        self.adapters: list[str] = []
        self.active: str | None = None
        self.checkpointed: set[str | None] = set()

    def add(self, adapter: str) -> "Role":
        """A new adapter called `adapter`, off, and the role that has it on."""
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules="|".join(map(re.escape, self.targets)),  # a list would also match ends of other names
            init_lora_weights="gaussian",
        )
        flags = [(parameter, parameter.requires_grad) for parameter in self.transformer.parameters()]
        plain = [self.transformer.get_submodule(name) for name in self.targets] if not self.adapters else []
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _whole_shapes(plain):
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # adapters beside each other are meant
            inject_adapter_in_model(config, self.transformer, adapter)
        for parameter, flag in flags:  # peft freezes all but the newest adapter
            parameter.requires_grad_(flag)
        self.layers = {name: self.transformer.get_submodule(name) for name in self.targets}
        with torch.no_grad():  # "gaussian" as peft has it, from numbers of our own
            for name, layer in self.layers.items():
                first = layer.lora_A[adapter].weight
                if first.is_meta:
                    continue
                first.copy_(normal(first.shape, self.seed, "adapter", len(self.adapters), name) / self.rank)
        self.adapters.append(adapter)
        self._switch(self.active)
        return Role(self, adapter).float().requires_grad_(True)

    @contextlib.contextmanager
    def role(self, adapter: str | None):
        """The transformer with `adapter` on (None: as it is); on leaving, with what was on before."""
        before = self.active
        self._switch(adapter)
        try:
            yield self.transformer
        finally:
            self._switch(before)

    def _switch(self, adapter: str | None) -> None:
        # What peft's own set_adapter and enable_adapters set, but for requires_grad, which they turn off for what is
        # not on: the gradient of an adapter that is off at the time of the backward pass would silently be none.
        self.active = adapter
        for layer in self.layers.values():
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter] if adapter else []

    def enable_gradient_checkpointing(self, adapter: str | None) -> None:
        """As diffusers' own, in the role with `adapter` on (None: the transformer as it is).

        What is recomputed in the backward pass has the role of the forward pass.
        """
        self.checkpointed.add(adapter)

        def checkpointed(module, *args):
            adapter = self.active
            if adapter not in self.checkpointed:
                return module(*args)

            def in_role(*args):
                with self.role(adapter):
                    return module(*args)

            return checkpoint(in_role, *args, use_reentrant=False)

        self.transformer.enable_gradient_checkpointing(checkpointed)


@contextlib.contextmanager
def _whole_shapes(layers):
    """Sharded weights of linear layers look whole inside: peft makes adapters of the shape of a shard, for tensor
    parallelism, where a layer under FSDP has gathered its weight by the time that it runs."""
    sharded = {layer: layer.weight for layer in layers if isinstance(layer.weight, DTensor)}
    for layer, weight in sharded.items():
        values = torch.empty(1, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        layer.weight = torch.nn.Parameter(values, requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in sharded.items():
            layer.weight = weight


class Role(torch.nn.Module):
    """A shared transformer in one role, called as the transformer is.

    Its parameters, and so its state, are those of the role's adapter alone, under the names that they have in a LoRA
    file; the role of the transformer as it is has none. `copy.deepcopy` adds an adapter with the same weights to the
    same base.

    Args:
        shared: the base.
        adapter: the one that is on in this role; None is the transformer as it is.
    """

    def __init__(self, shared: SharedBase, adapter: str | None = None):
        super().__init__()
        self.shared, self.adapter_name = shared, adapter
        for name, layer in shared.layers.items() if adapter else ():
            place = self
            for part in name.split("."):
                if part not in place._modules:
                    place.add_module(part, torch.nn.Module())
                place = place._modules[part]
            place.lora_A, place.lora_B = layer.lora_A[adapter], layer.lora_B[adapter]
        self.eval()

    @property
    def input_dtype(self) -> torch.dtype:
        """Of the transformer, whatever that of the adapter is."""
        return self.shared.dtype

    def forward(self, *args, **kwargs):
        with self.shared.role(self.adapter_name) as transformer:
            return transformer(*args, **kwargs)

    def enable_gradient_checkpointing(self) -> None:
        self.shared.enable_gradient_checkpointing(self.adapter_name)

    def on(self, transformer) -> "Role":
        """The same role on another transformer with the same layers, which becomes a base."""
        mine = self.shared
        shared = SharedBase(transformer, mine.targets, rank=mine.rank, alpha=mine.alpha)
        role = shared.add(self.adapter_name)
        attach_as(role, self)
        role.load_state_dict(self.state_dict())
        return role

    def __deepcopy__(self, memo):
        copied = self.shared.add(f"{self.adapter_name}_{len(self.shared.adapters)}")
        attach_as(copied, self)
        copied.load_state_dict(self.state_dict())
        return copied


def without_adapters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a base with adapters, as it was before it had any."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def quantize(transformer, names: list[str], kind: str, device=None) -> None:
    """Replace the linear layers called `names` by frozen ones of bitsandbytes, in place.

    Args:
        kind: "8bit" (LLM.int8) or "nf4" (NormalFloat of 4 bits, without double quantization). On the CPU too, which
            diffusers' own quantization while loading refuses.
        device: where they are to be; by default where each of them is. There is never more on it than what is
            quantized already and one layer as it was.

    Layers on the meta device get the sizes of bitsandbytes' (`QuantizedSizes`).
    """
    if transformer.device.type == "meta":
        for name in names:
            transformer.set_submodule(name, QuantizedSizes(transformer.get_submodule(name), kind))
        return
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    # a line for every multiplication of float32 or bfloat16 values
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name in names:
        linear = transformer.get_submodule(name)
        with torch.device("meta"):
            if kind == "nf4":
                layer = Linear4bit(linear.in_features, linear.out_features, compress_statistics=False)
            else:
                layer = Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=6.0)
        values = linear.weight.detach().cpu()
        if kind == "nf4":
            # the packed layout that it would take under no_grad on some CPUs has no backward pass
            layer.support_avx512bf16_for_cpu = False
            weight = Params4bit(values, quant_type="nf4", compress_statistics=False, module=layer)
        else:
            weight = Int8Params(values, requires_grad=False, has_fp16_weights=False)
        layer.weight = weight.to(device or linear.weight.device)  # moving is what quantizes
        layer.bias = linear.bias
        transformer.set_submodule(name, layer.eval().requires_grad_(False))
    transformer.is_loaded_in_4bit, transformer.is_loaded_in_8bit = kind == "nf4", kind == "8bit"  # peft asks


@torch.no_grad()
def merged(network):
    """A role as a transformer of its own: the base, dequantized, plus what the adapter adds, float32 on the CPU.

    What has no adapter may share memory with the base. Any other network is returned as it is.
    """
    if not isinstance(network, Role):
        return network
    transformer, adapter = network.shared.transformer, network.adapter_name
    memo = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in transformer.parameters()}
    for name in network.shared.linear_layers:
        module = transformer.get_submodule(name)
        layer = module.base_layer if name in network.shared.layers else module
        weight = _dequantized(layer).to("cpu", torch.float32)
        if adapter and name in network.shared.layers:
            down, up = (matrices[adapter].weight.to("cpu") for matrices in (module.lora_A, module.lora_B))
            weight = weight + module.scaling[adapter] * up @ down
        with torch.device("meta"):
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            linear.bias = torch.nn.Parameter(layer.bias.detach(), requires_grad=False)
        memo[id(module)] = linear.eval()  # which the copy below takes instead
    alone = copy.deepcopy(transformer, memo).to("cpu", torch.float32)
    for attribute in ("peft_config", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(alone).pop(attribute, None)
    if alone.is_gradient_checkpointing:
        alone.disable_gradient_checkpointing()
    return alone


def _dequantized(layer) -> torch.Tensor:
    """The weight of a linear layer; peft's function for it leaves an 8-bit layer on the CPU without its scales."""
    if layer.weight.is_floating_point():
        return layer.weight.detach()
    from bitsandbytes import functional

    if hasattr(layer.weight, "quant_state"):
        return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB  # the first forward pass moves them
    return functional.int8_vectorwise_dequant(layer.weight.data, scales)


def save_lora(pipeline, network, folder) -> Path | None:
    """Write a role's adapter as a diffusers LoRA file, for `load_lora_weights(folder)` on the teacher's pipeline.

    alpha / rank is in the weights, so that whatever reads the file needs no alpha. Returns the file; None, and nothing
    is written, if `network` is no role with an adapter, has a flow map, which is in no such file, or if the class of
    `pipeline` loads no LoRA for a transformer.
    """
    save = getattr(type(pipeline), "save_lora_weights", None)
    loads = save is not None and "transformer_lora_layers" in inspect.signature(save).parameters
    if not loads or not isinstance(network, Role) or network.adapter_name is None or flow_map_of(network):
        return None
    scale = network.shared.alpha / network.shared.rank
    layers = {
        name: tensor.detach().cpu() * (scale if ".lora_B." in name else 1)
        for name, tensor in network.state_dict().items()
    }
    save(str(folder), transformer_lora_layers=layers, weight_name=LORA_FILE)
    return Path(folder, LORA_FILE)
