"""A request from submission to proof: queue, service, certificate."""
