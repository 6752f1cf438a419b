"""Constraints on every change of a model."""
