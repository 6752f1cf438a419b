"""Data sources, and how samples are spread over clients."""
