"""Client sides of server strategies."""
