"""A run's life: setup, session, resume, extend, forget, verify, export."""
