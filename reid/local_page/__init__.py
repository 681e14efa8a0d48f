"""The local page for searching in a browser: what it finds and how that is shown; for page.py."""
