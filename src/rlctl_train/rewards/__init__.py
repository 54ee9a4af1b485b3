"""Rewards: one file each, plus the processes that run them under a time limit."""
