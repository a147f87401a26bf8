# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Distil diffusers flow-matching text-to-image pipelines into few-step generators."""

import importlib
from collections.abc import Callable


__version__ = "0.1.0.dev0"


def on_demand(package: str, modules: dict[str, list[str]]) -> Callable[[str], object]:
    """The `__getattr__` of a package (PEP 562) that imports a name's module when the name is asked for.

    So what is light in a package can be imported without the rest of it.

    Args:
        modules: module of the package -> the names in it. No name may be a module's too.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name):
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return __getattr__
