"""ε_θ(x_t, t): one backbone a file."""
