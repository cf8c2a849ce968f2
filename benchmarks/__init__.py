"""Measurements of time, memory and scaling, compared with the alternatives; see README.md in this folder.

Installed as `magicface_rt.benchmarks`, for `magicface-rt bench`; in the repository also `python -m benchmarks.bench`.
"""
