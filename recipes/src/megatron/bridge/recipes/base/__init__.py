"""What recipes are made of: sizes as data, a base per task, and changes that take a description and give another."""
