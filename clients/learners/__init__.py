"""Local continual learners."""
