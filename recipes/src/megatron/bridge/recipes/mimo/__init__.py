"""Models of several modules."""
