"""Weights from trainer to rollout: bucketed, versioned, checked."""
