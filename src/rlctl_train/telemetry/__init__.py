"""Metrics, trackers and the report of a run."""
