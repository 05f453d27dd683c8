"""Training compared: every parallel layout with one rank, and one rank with a plain torch loop over transformers."""
