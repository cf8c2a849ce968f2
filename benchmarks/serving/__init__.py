"""The parts of the load run, `python -m benchmarks.serve_load`."""
