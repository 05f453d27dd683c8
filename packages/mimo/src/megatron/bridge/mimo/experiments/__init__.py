"""Placements of one model measured side by side: read from YAML, run one after another, told in one report."""
