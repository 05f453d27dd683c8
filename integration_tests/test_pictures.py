"""The pictures that a script draws are those that lie in docs/."""

import runpy
from xml.etree import ElementTree

import pytest
from small_models import REPOSITORY

DRAWN = runpy.run_path(str(REPOSITORY / "docs/site/pictures.py"))["PICTURES"]


@pytest.mark.parametrize("name", DRAWN)
def test_it_is_the_one_in_docs(name: str) -> None:
    drawn = DRAWN[name]()
    assert (REPOSITORY / "docs" / name).read_text("utf-8") == drawn, "run `uv run docs/site/pictures.py`"
    picture = ElementTree.fromstring(drawn)
    width, height = (float(picture.attrib[side]) for side in ("width", "height"))
    for each in picture.iter("{http://www.w3.org/2000/svg}rect"):
        assert 0 <= float(each.get("x", 0)) <= width - float(each.attrib["width"])
        assert 0 <= float(each.get("y", 0)) <= height - float(each.attrib["height"])
