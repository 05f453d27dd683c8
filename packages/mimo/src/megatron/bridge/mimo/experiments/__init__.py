"""Placements measured side by side: one YAML file each, one report over all."""
