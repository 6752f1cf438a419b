"""Real devices: the folder of a fleet, its certificates and keys, its processes, and runs on it."""
