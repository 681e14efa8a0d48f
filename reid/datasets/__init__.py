"""Raw datasets as prepare.py finds them: their layouts, CUHK03's forms, one's own photos."""
