"""Which task is learned when, and which samples it owns."""
