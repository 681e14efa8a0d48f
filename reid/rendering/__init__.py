"""The rendered stand-in for Market-1501: its people and cameras. Imports nothing else of reid/."""
