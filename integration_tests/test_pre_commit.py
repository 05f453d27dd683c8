"""The hooks before a commit are the steps of `just check`, by the same commands."""

import re

import yaml
from small_models import REPOSITORY


def test_every_step_of_the_check_has_its_hook() -> None:
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = {hook["id"]: hook["entry"] for repo in config["repos"] for hook in repo["hooks"]}
    (steps,) = re.findall(r"^check: (.*)$", (REPOSITORY / "justfile").read_text("utf-8"), re.MULTILINE)
    assert hooks == {step: f"uv run --locked just {step}" for step in steps.split()}
