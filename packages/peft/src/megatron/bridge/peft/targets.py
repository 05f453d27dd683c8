"""How `target_modules` names modules."""

import fnmatch


def matches(pattern: str, full_name: str) -> bool:
    """Whether `pattern` is the module's last name, its full name, or a shell pattern of the full name."""
    return pattern == full_name.rpartition(".")[2] or fnmatch.fnmatchcase(full_name, pattern)
