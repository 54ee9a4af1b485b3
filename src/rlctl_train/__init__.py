"""The workshop: everything that trains. Started by `python -m rlctl_train RUN_DIR`; never imports `rlctl`."""
