"""Data: prepare files, check them, load and order rows, pack and balance sequences."""
