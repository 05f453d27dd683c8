"""What can be wrong with a configuration, by the part of it that is; `validation` asks for all of it at once."""
