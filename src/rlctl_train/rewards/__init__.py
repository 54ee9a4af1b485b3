"""Rewards: one file each, plain Python without torch, run in worker processes by `pool.GraderPool`."""
