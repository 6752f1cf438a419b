"""What a method implements: strategy parts, learner plugins, unlearners, and the requests they answer."""
