# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What leaves the project: the student as a diffusers repository, its model card, its way to the Hub."""
