"""Recipes: functions that return a ready ConfigContainer. One module per family; torch is loaded when one is built."""
