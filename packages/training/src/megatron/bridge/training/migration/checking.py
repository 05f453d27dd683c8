"""Whether a translation makes a configuration that could run. Loads torch and Megatron-Core."""

import tempfile
from pathlib import Path


def expect_to_run(text: str, world_size: int | None) -> None:
    """Build the configuration of a translated file, and check all that can be without its data and machine.

    Args:
        text: of the file.
        world_size: number of ranks to check the layout against; None for one replica of the model.

    Raises:
        ConfigError: what could not run.
    """
    from megatron.bridge.platform.engine import import_engine
    from megatron.bridge.training.migration.recipe import megatron_lm
    from megatron.bridge.training.overrides import apply_yaml
    from megatron.bridge.training.problems.layout import model_parallel_size

    import_engine()
    cfg = megatron_lm()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "translated.yaml"
        file.write_text(text, "utf-8")
        apply_yaml(cfg, file)
    cfg.validate(world_size or model_parallel_size(cfg.model), frozenset())
