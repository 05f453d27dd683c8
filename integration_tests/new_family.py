"""`just new-family ARCHITECTURE`: a family's file, entry point and test case, for a model that transformers has.

The family begins as Llama's layout. Its test says what differs, weight by weight, until it passes.
"""

import argparse
import re
import sys
from pathlib import Path
from string import Template

from megatron.bridge.errors import BridgeError, did_you_mean

MODELS = Path(__file__).parents[1] / "packages/models"
_GROUP = '[project.entry-points."megatron.bridge.model_bridges"]\n'
_FAMILY = Template('''\
"""$Class (`$architecture`)."""

from megatron.bridge.models.families.dense import DenseBridge


class ${Class}Bridge(DenseBridge):
    """`$architecture`: Llama's layout."""
''')
_TEST = Template('''\
"""`$architecture` against transformers, by the family test kit."""

import pytest
from transformers import $config_class

from megatron.bridge.testing import check_family

# The zoo proves each of them at every layout: `just zoo $architecture`.
CONFIGS = {
    "$module": $config_class(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="float32",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_transformers_does(name):
    check_family(CONFIGS[name])
''')


def main() -> int:
    """Write what the command line names; 1 when it is refused."""
    parser = argparse.ArgumentParser(prog="just new-family", description=__doc__.partition("\n")[0])
    parser.add_argument("architecture", help="as config.json has it: Olmo2ForCausalLM")
    try:
        written = write(parser.parse_args().architecture)
    except BridgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*written, sep="\n")
    print(f"Next: uv sync && uv run pytest -n 0 {written[1]}, and say in {written[0].name} what differs")
    return 0


def write(architecture: str, models: Path = MODELS) -> tuple[Path, Path, Path]:
    """Write the family's file and test, and add its entry point; returns these three files.

    Args:
        architecture: a causal language model of transformers.
        models: folder of the package.

    Raises:
        BridgeError: transformers has no such model, or it is offered already; nothing is written.
    """
    fields = _fields(architecture)
    module = fields["module"]
    family = models / f"src/megatron/bridge/models/families/{module}.py"
    test = models / f"tests/test_{module}_families.py"
    project = models / "pyproject.toml"
    points = _with_entry_point(project.read_text("utf-8"), architecture, f"{module}:{fields['Class']}Bridge")
    for file in (family, test):
        if file.exists():
            raise BridgeError(f"{file} exists; add a class for {architecture} to what is there")
    project.write_text(points, "utf-8")
    family.write_text(_FAMILY.substitute(fields), "utf-8")
    test.write_text(_TEST.substitute(fields), "utf-8")
    return family, test, project


def _fields(architecture: str) -> dict[str, str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(name, str)}
    if architecture not in kinds:
        raise BridgeError(
            f"transformers has no causal language model {architecture!r}{did_you_mean(architecture, kinds)}; "
            "begin a plugin with a reference of its own instead: just new-plugin NAME --kind family"
        )
    kind = kinds[architecture]
    return {
        "architecture": architecture,
        "Class": re.sub(r"(ForCausalLM|LMHeadModel)$", "", architecture),
        "module": kind.replace("-", "_"),
        "config_class": CONFIG_MAPPING_NAMES[kind],
    }


def _with_entry_point(project: str, architecture: str, target: str) -> str:
    """`pyproject.toml` with one more family, in its place by the alphabet."""
    before, _, rest = project.partition(_GROUP)
    table, separator, after = rest.partition("\n\n")
    points = table.splitlines()
    if any(point.startswith(f"{architecture} =") for point in points):
        raise BridgeError(
            f"{architecture} is offered already; `megatron-bridge models {architecture}` says what it can"
        )
    points.append(f'{architecture} = "megatron.bridge.models.families.{target}"')
    return before + _GROUP + "\n".join(sorted(points, key=str.casefold)) + separator + after


if __name__ == "__main__":
    sys.exit(main())
