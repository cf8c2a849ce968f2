"""Tools for the supply chain (lock files, their installation, licences, the bill of materials) and mutation testing.

Nothing here is in the wheel. Each module is run as `python -m tools.NAME` by a target of the Makefile.
"""
