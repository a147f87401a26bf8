# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A contract in words."""

from typing import Any


def in_words(contract) -> dict[str, Any]:
    """What a `Contract` says, in words and numbers that go into a log or a table."""
    output = "output"
    if contract.output_part is not None:
        dim, start, length = contract.output_part
        whole = contract.output_shape[dim - 1]
        first_half = dim == 1 and start == 0 and 2 * length == whole
        place = "last" if start < 0 else "first"
        output = "first half of the channels" if first_half else f"{place} {length} along dimension {dim}"
    order = (
        ("conditional", "unconditional") if contract.guidance.conditional_first else ("unconditional", "conditional")
    )
    guidance = "none" if contract.guidance.kind == "none" else f"{contract.guidance.kind}, {order[0]} first"
    kept = {path.split(".")[0] for path in contract.slots}
    return {
        "pipeline": contract.pipeline_class,
        "transformer": contract.transformer_class,
        "size": f"{contract.height}x{contract.width}",
        "latent": f"{contract.latent_argument} {list(contract.latent_shape)}",
        "time": f"{contract.time_argument} = {_time(contract)}",
        "time_seen": contract.time_rounding and f"{contract.time_rounding}; noise levels are drawn on its grid",
        "velocity": ("-" if contract.output_sign < 0 else "") + output,
        "conditioning": sorted(contract.slots),
        "varying_length": sorted(path for path, slot in contract.slots.items() if slot.ragged is not None),
        "constant": sorted(name for name, value in contract.static.items() if value is not None and name not in kept),
        "guidance": guidance
        if contract.guidance.plain
        else f"{guidance}, combined here without the pipeline's rescaling",
        "guidance_modes": list(contract.guidance_modes),
        "guidance_argument": _guidance_argument(contract.guidance),
        "embedded_guidance": contract.embedded_guidance and contract.embedded_guidance[0],
        "replay_error": contract.replay_error,
    }


def _time(contract) -> str:
    if contract.time_table is None:
        return _affine(contract.time_scale, contract.time_offset)
    times = contract.time_table[1]
    return f"table of sigma, from {times[0]:.4g} to {times[-1]:.4g}"


def _guidance_argument(guidance) -> str | None:
    if guidance.kind == "none" or guidance.argument is None:
        return None if guidance.kind == "none" else "a guider"
    return guidance.argument + (f" (off at {guidance.off:g})" if guidance.off != 1 else "")


def _affine(scale: float, offset: float) -> str:
    slope = {1.0: "sigma", -1.0: "-sigma"}.get(scale, f"{scale:g} * sigma")
    if offset == 0:
        return slope
    return (
        f"{offset:g} - {slope[1:]}"
        if slope.startswith("-")
        else f"{slope} {'+' if offset > 0 else '-'} {abs(offset):g}"
    )
