"""The rendered stand-in for Market-1501: its people and its cameras. Imports nothing of ours."""
