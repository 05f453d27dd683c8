"""`primus train`, and `python -m primus.cli.convert`."""
