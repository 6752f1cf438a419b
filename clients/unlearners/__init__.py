"""Local unlearners."""
