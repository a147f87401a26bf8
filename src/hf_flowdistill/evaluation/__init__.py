# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Generating pictures for a list of prompts, scoring them, and reporting what was found."""
