"""How good samples are: the judge, and the figures."""
