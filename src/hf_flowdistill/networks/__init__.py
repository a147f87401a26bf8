# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The networks of a distillation: loaded, copied or shared as roles, and what is read out of them."""
