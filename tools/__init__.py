"""What keeps the supply chain in order: lock files, their installation, licences, and the bill of materials.

Nothing here is in the wheel. Each module is run as `python -m tools.NAME` by a target of the Makefile.
"""
