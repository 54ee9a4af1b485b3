"""Algorithms as pure tensor functions: one file each, plus the operations they share."""
