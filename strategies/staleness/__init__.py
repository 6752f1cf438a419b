"""What to do with late updates."""
