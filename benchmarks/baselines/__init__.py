"""The baselines: what one would run without the SDK, and what it is timed against.

    authors.py    (a) the authors' algorithm in eager PyTorch, with all the work that it does
    strong.py     (b) the same pictures by the best eager PyTorch that we know; (c) is torch.compile of it
    plain.py      (d) plain Stable Diffusion by diffusers, no concepts: the floor that a user knows

(a) and (b) have the interface of `magicface_rt.export.reference.MagicFaceReference`, so recordings can be replayed with
them; a test does that before anything is timed.
"""
