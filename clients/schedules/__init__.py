"""Schedules of a client's learning rate."""
