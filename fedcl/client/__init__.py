"""The client: local loop, plugin contract, client state, and what a message does."""
