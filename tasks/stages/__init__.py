"""The stages of a run, which of them must run and why, and running them."""
