"""The server: round loop, strategy pipeline and its contracts, messaging, validation, folding."""
