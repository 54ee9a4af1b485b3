"""Ways to start a run: submit, status, logs, stop."""
