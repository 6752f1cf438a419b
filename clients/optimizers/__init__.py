"""Optimizers that clients train with, beside the SGD of the training loop."""
