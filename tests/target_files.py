"""A target file of a user's own, for tests of what reads them."""

from __future__ import annotations

OWN = """
flavour = "tensorrt-rtx"
compute_capabilities = ["8.6"]
precisions = ["float16"]
full_masks = 2
[images]
optimum = 1
maximum = 2
[references]
optimum = 1
maximum = 4
[scratch_limits_mib]
denoise_step = 100
others = 200
[builder]
tf32 = true
"""
