"""Runs as jobs of a Ray cluster: `client.py` is used here, `attempts.py` is what runs there."""
