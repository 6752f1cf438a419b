"""Evaluation: accuracy of a model on tasks, and everything computed from it."""
