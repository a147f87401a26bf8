# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What takes the place of bitsandbytes' layers and Adam where there are no values: the same bytes, nothing computed.

Its kernels need values. Sizes are those of `MatMul4Bit` and `MatMul8bitLt` in bitsandbytes 0.50: the stored weight and
its scales, the weight dequantized for a moment in either pass, what is kept for the backward pass, and what the
8-bit product takes besides.
"""

import math

import torch
from torch.nn.functional import linear


class QuantizedSizes(torch.nn.Linear):
    """A frozen linear layer of the sizes that `source`, on the meta device, has in "8bit" or "nf4"."""

    def __init__(self, source: torch.nn.Linear, kind: str):
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        size = self.weight.numel()
        # 4 bits, and a float32 for every 64 values; or 8 bits, and a float32 for every row
        dtype, stored, scales = {
            "nf4": (torch.uint8, (math.ceil(size / 2), 1), math.ceil(size / 64)),
            "8bit": (torch.int8, self.weight.shape, source.out_features),
        }[kind]
        self.weight = torch.nn.Parameter(torch.empty(stored, dtype=dtype, device="meta"), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32, device="meta"))
        self.bias, self.kind, self.dtype = source.bias, kind, source.weight.dtype

    def forward(self, x):
        return _Product.apply(x, self.weight, self.bias, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.weight, ctx.layer = weight, layer
        if layer.kind == "nf4":
            return linear(x, _dequantized(weight, layer, layer.dtype).to(x.dtype), bias)
        ctx.x = x  # kept until the backward pass, although the weight is frozen
        half = x.to(torch.float16)
        codes = half.to(torch.int8)
        product = codes.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.int32)
        return product.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        values = _dequantized(ctx.weight, ctx.layer, ctx.layer.dtype).to(gradient.dtype)
        return gradient @ values, None, None, None


def _dequantized(weight, layer, dtype):
    return weight.new_empty(layer.out_features, layer.in_features, dtype=dtype)


class Adam8bitSizes(torch.optim.Optimizer):
    """An optimizer with the moments of bitsandbytes' Adam8bit, and what rounding to bfloat16 takes, that does nothing.

    Moments of fewer than 4,096 values are float32, others have 8 bits and a float32 for every 256 values.
    """

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            size = parameter.numel()
            for moment in ("1", "2") if parameter not in self.state or not self.state[parameter] else ():
                kind = torch.float32 if size < 4096 else torch.uint8
                self.state[parameter][f"state{moment}"] = torch.zeros_like(parameter, dtype=kind)
                if size >= 4096:
                    scales = parameter.new_zeros(math.ceil(size / 256), dtype=torch.float32)
                    self.state[parameter][f"absmax{moment}"] = scales
            if parameter.dtype == torch.bfloat16:  # updated in float32, then rounded by random numbers of 32 bits
                taken = parameter.float(), parameter.float(), parameter.float()
                del taken
