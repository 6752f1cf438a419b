"""Simulation: grids that run clients in this process or on Ray."""
