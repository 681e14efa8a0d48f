"""A trained network as one file for other programs: what export.py writes, and its checks."""
