"""The recipe book has every recipe; `just recipes` writes it."""

from recipe_book.page import TASKS
from small_models import REPOSITORY

from megatron.bridge.recipes.base.families import sizes

PAGE = REPOSITORY / "docs/recipe-book.md"


def test_the_book_has_every_size_counted_as_published_and_tried() -> None:
    rows = {line.split("]")[0][3:]: line.split(" | ") for line in PAGE.read_text("utf-8").splitlines() if "| [" in line}
    assert rows.keys() == sizes().keys()
    for name, (_, size) in sizes().items():
        counted = int(rows[name][2].replace(",", ""))
        # To the digits that were published, or half a percent.
        digits = len(size.parameters[:-1].partition(".")[2])
        last = 10.0**-digits * (1e9 if size.parameters.endswith("B") else 1e6)
        assert abs(counted - size.num_parameters) <= max(0.5 * last, 0.005 * size.num_parameters), name
        assert rows[name][3].split() == [task[0] for task in TASKS], name
