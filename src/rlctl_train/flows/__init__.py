"""Training dataflows: one small file each, as plain functions over the controller's verbs."""
