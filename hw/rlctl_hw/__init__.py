"""The survey: what hardware is there, and what fits on it. Standard library, nvidia-ml-py and psutil only."""
