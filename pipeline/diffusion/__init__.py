"""The forward process q, the reverse process p, and the training objective."""
