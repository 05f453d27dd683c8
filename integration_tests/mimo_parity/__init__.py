"""Training a vision-language model at MIMO placements beside transformers' own model and torch's AdamW."""
