"""The zoo: every architecture, as a tiny random model, proven at every layout; what `just zoo` runs and records."""
