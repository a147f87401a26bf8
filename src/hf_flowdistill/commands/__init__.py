# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The commands of `flowdistill`, a module each, with a `main` that takes the words after the command."""
