"""Checkpoints: save, load, export; atomic on disk."""
