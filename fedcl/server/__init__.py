"""The server: round loop, strategy pipeline, messaging, validation, aggregation."""
