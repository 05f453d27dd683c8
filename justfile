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
    mypy packages recipes

layers:
    lint-imports

# Put the code in order.
fix:
    ruff format .
    ruff check --fix .

test *args:
    pytest {{args}}
