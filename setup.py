# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Everything but the list of packages is in setup.cfg, which cannot say "all of src, and model_cards"."""

from setuptools import find_packages, setup


setup(packages=[*find_packages("src"), "hf_flowdistill.model_cards"])
