# The one door: `uv run just check`. CI calls the same.

# Everything that must hold before a change lands, but the tests.
check: lock format lint types layers

lock:
    uv lock --check

format:
    ruff format --check .

lint:
    ruff check .

types:
    MYPYPATH="$(printf '%s:' plugins/*/src)" mypy packages recipes plugins

layers:
    lint-imports

# Put the code in order.
fix:
    ruff format .
    ruff check --fix .

test *args:
    pytest {{args}}

# Prove architectures at every layout and record it (docs/capabilities.md): all, or those named; --missing for new ones.
zoo *args:
    PYTHONPATH=integration_tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m zoo {{args}}

# Train at every layout beside one rank, and one rank beside plain torch (docs/parity.md): all models, or those named.
parity *args:
    PYTHONPATH=integration_tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m parity {{args}}

# Measure MIMO placements of the digits side by side, and put the report into docs/mimo.md.
mimo-experiments *args:
    PYTHONPATH=integration_tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python integration_tests/mimo_experiments.py {{args}}

# What a tower takes that tensor parallelism divides, beside one that is whole on every rank (docs/mimo.md).
mimo-towers:
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python integration_tests/mimo_towers.py

# Train a vision-language model at every MIMO placement beside transformers (docs/mimo-parity.md).
mimo-parity:
    PYTHONPATH=integration_tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m mimo_parity

# Write the recipes' entry points and layouts, try a tiny variant of each, and record it (docs/recipe-book.md).
recipes *args:
    PYTHONPATH=integration_tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m recipe_book {{args}}

# Build the documentation into site/; a broken link or anchor is an error.
docs:
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# Show it on this machine, built anew at every change.
docs-serve *args:
    NO_MKDOCS_2_WARNING=1 mkdocs serve {{args}}

# Write down the public names and signatures (docs/api), which a test holds to the sources.
api:
    PYTHONPATH=integration_tests python -m public_api

# Test the plugin for NeMo-Run, which wants an environment of its own.
nemo-run:
    uv venv --quiet --clear .venv-nemo-run
    uv pip install --quiet --python .venv-nemo-run/bin/python -e packages/conversion -e packages/models -e packages/peft \
        -e packages/data -e packages/training -e plugins/nemo_run pytest pytest-timeout hypothesis 'torch<2.14'
    .venv-nemo-run/bin/python -m pytest plugins/nemo_run -q

# Begin a package in plugins/ and make it a member of the workspace: `just new-plugin acme-norms --kind peft`.
new-plugin name *args:
    megatron-bridge new plugin {{name}} --into plugins {{args}}
    uv add --group plugins ./plugins/{{name}}

# Begin a family in packages/models for a model that transformers has: `just new-family Olmo2ForCausalLM`.
new-family architecture:
    PYTHONPATH=integration_tests python -m new_family {{architecture}}
