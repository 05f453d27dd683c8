"""The page on plugins lists every entry-point group there is, and no other."""

import re

from small_models import REPOSITORY

from megatron.bridge.registry import installed_groups

# Groups of a plugin's own.
OF_PLUGINS = {"megatron.bridge.primus_patches"}


def test_every_group_is_in_the_table() -> None:
    page = (REPOSITORY / "docs/plugins.md").read_text("utf-8")
    listed = re.findall(r"^\| `(megatron\.bridge\.\w+)`", page, re.MULTILINE)
    assert sorted(listed) == sorted(set(installed_groups()) - OF_PLUGINS)
