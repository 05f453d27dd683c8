"""Recipes: functions that return a ready ConfigContainer."""
