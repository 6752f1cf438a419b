"""The floor everything stands on: random streams, files, trees, linear algebra."""
