"""The established name of what a family is given: see `causal_lm`."""
