"""Rollout engines. Each is a plain object that runs without Ray."""
