# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a training takes, told from configurations alone: every choice rehearsed without weights."""
