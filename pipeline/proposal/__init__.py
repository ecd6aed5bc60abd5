"""A config for images that nobody has trained on yet: what is chosen, and why."""
