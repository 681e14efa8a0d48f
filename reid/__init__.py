"""The parts that the scripts at the root share, one concern a file. Imports run downward only."""
