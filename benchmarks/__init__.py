"""How long, how much memory, how it grows, against what one would otherwise run; see README.md in this folder.

Installed as `magicface_rt.benchmarks`, for `magicface-rt bench`; in the repository also `python -m benchmarks.bench`.
"""
