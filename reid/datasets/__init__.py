"""Raw datasets that prepare.py reads: the common layouts, CUHK03's forms, own photos."""
