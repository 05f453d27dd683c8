"""Registries against real distributions: dist-info folders in a temporary folder on sys.path."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.bridge.registry import (
    BrokenPlugin,
    ConflictingPlugins,
    Offer,
    Registry,
    UnknownPlugin,
    installed_groups,
    refresh,
)

GROUP = "megatron.bridge.test_shapes"
type Install = Callable[..., Path]


class Shape:
    """What the plugins of these tests are."""


@pytest.fixture
def shapes() -> Registry[type[Shape]]:
    return Registry(GROUP, Shape, "shape")


def _import_shape(name: str) -> str:
    # This test module has no name that a plugin could import under importlib mode.
    return f"import sys\nShape = sys.modules[{__name__!r}].Shape\nclass {name}(Shape): pass\n"


def test_listing_imports_nothing_and_names_the_origin(install: Install, shapes: Registry[type[Shape]]) -> None:
    install("acme-shapes", f"[{GROUP}]\nsquare = shape_square:Square\n", shape_square="raise SystemExit('imported')")
    assert shapes.offers() == (Offer("square", "shape_square:Square", "acme-shapes", "1.0"),)
    assert list(shapes) == ["square"]
    assert "square" in shapes
    assert "circle" not in shapes
    assert GROUP in installed_groups()
    assert "shape_square" not in sys.modules


def test_offers_agree_with_importlib(install: Install, shapes: Registry[type[Shape]]) -> None:
    install("acme-shapes", f"[{GROUP}]\nsquare = a:Square\nround.one = b.c:D.e [extra]\n[other.group]\nx = y:z\n")
    points = importlib.metadata.entry_points(group=GROUP)
    assert {(offer.name, offer.target) for offer in shapes.offers()} == {(point.name, point.value) for point in points}


def test_loading_loads_exactly_one_and_once(install: Install, shapes: Registry[type[Shape]]) -> None:
    points = f"[{GROUP}]\nsquare = shape_square:Square\nbomb = shape_bomb:Bomb\n"
    install("acme-shapes", points, shape_square=_import_shape("Square"), shape_bomb="raise RuntimeError('boom')")
    assert shapes["square"].__name__ == "Square"
    assert shapes["square"] is shapes["square"]
    assert "shape_bomb" not in sys.modules


def test_unknown_name_gives_near_matches_and_how_to_list(install: Install, shapes: Registry[type[Shape]]) -> None:
    install("acme-shapes", f"[{GROUP}]\nsquare = shape_square:Square\n")
    with pytest.raises(UnknownPlugin, match=r"no shape is called 'Sqare'; did you mean 'square'\?.*plugins --group"):
        shapes["Sqare"]


def test_unknown_name_names_the_package_that_would_provide_it(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(site)])
    refresh()
    methods = Registry[object]("megatron.bridge.peft", object, "PEFT method")
    with pytest.raises(UnknownPlugin, match="uv pip install megatron-bridge-peft"):
        methods["lora"]


def test_two_distributions_with_one_name_conflict_only_when_used(
    install: Install, shapes: Registry[type[Shape]]
) -> None:
    install("acme-shapes", f"[{GROUP}]\nsquare = shape_square:Square\n", shape_square=_import_shape("Square"))
    install("zeta-shapes", f"[{GROUP}]\nsquare = shape_other:Square\ncube = shape_square:Square\n", version="2.5")
    assert len(shapes.offers("square")) == 2
    assert shapes["cube"].__name__ == "Square"
    with pytest.raises(ConflictingPlugins, match=r"zeta-shapes 2\.5 .*acme-shapes 1\.0 .*uninstall one"):
        shapes["square"]


def test_one_distribution_with_one_name_twice_conflicts(install: Install, shapes: Registry[type[Shape]]) -> None:
    install("acme-shapes", f"[{GROUP}]\nsquare = a:A\nsquare = b:B\n")
    with pytest.raises(ConflictingPlugins, match="tell the authors of acme-shapes"):
        shapes["square"]


def test_a_shadowed_older_copy_is_no_conflict(
    install: Install, site: Path, monkeypatch: pytest.MonkeyPatch, shapes: Registry[type[Shape]]
) -> None:
    later = site / "later"
    monkeypatch.setattr(sys, "path", [*sys.path, str(later)])
    install("Acme_Shapes", f"[{GROUP}]\nsquare = old:Square\ngone = old:Gone\n", "0.9", later)
    install("acme-shapes", f"[{GROUP}]\nsquare = shape_square:Square\n", shape_square=_import_shape("Square"))
    assert shapes.offers() == (Offer("square", "shape_square:Square", "acme-shapes", "1.0"),)
    assert issubclass(shapes["square"], Shape)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit('leaving')", "SystemExit: leaving"),
        ("assert False, 'unsure'", "AssertionError: unsure"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
        ("Circle = 1", "AttributeError.*Square"),
    ],
)
def test_a_broken_plugin_names_its_distribution_and_leaves_the_others(
    install: Install, shapes: Registry[type[Shape]], source: str, reason: str
) -> None:
    install("bad-shapes", f"[{GROUP}]\nbad = shape_bad:Square\n", "3.1", shape_bad=source)
    install("acme-shapes", f"[{GROUP}]\nsquare = shape_square:Square\n", shape_square=_import_shape("Square"))
    with pytest.raises(
        BrokenPlugin, match=rf"shape 'bad' of bad-shapes 3\.1 .*{reason}.*uninstall bad-shapes"
    ) as caught:
        shapes["bad"]
    assert caught.value.__cause__ is not None
    assert issubclass(shapes["square"], Shape)


def test_ctrl_c_during_a_plugin_s_import_is_not_the_plugin_s_fault(
    install: Install, shapes: Registry[type[Shape]]
) -> None:
    install("acme-shapes", f"[{GROUP}]\nsquare = shape_square:Square\n", shape_square="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        shapes["square"]


@pytest.mark.parametrize("line", ["square", "square =", "square = not a target", "square = :Square"])
def test_a_malformed_entry_point_is_listed_and_refused_alone(
    install: Install, shapes: Registry[type[Shape]], line: str
) -> None:
    install("bad-shapes", f"[{GROUP}]\n# comment\n{line}\ncube = shape_cube:Cube\n", shape_cube=_import_shape("Cube"))
    assert list(shapes) == ["cube", "square"]
    assert issubclass(shapes["cube"], Shape)
    with pytest.raises(BrokenPlugin, match=r"bad-shapes 1\.0 .*not of the form module:attribute"):
        shapes["square"]


def test_a_half_deleted_distribution_is_no_origin(site: Path, install: Install, shapes: Registry[type[Shape]]) -> None:
    (site / "ghost-1.0.dist-info").mkdir()
    (site / "ghost-1.0.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\nghost = a:b\n")
    install("acme-shapes", f"[{GROUP}]\nsquare = a:b\n")
    assert list(shapes) == ["square"]


def test_wrong_kind_is_refused_by_class_and_by_predicate(install: Install, shapes: Registry[type[Shape]]) -> None:
    install("acme-shapes", f"[{GROUP}]\nnumber = shape_number:VALUE\n", shape_number="VALUE = 3")
    with pytest.raises(BrokenPlugin, match=r"'number' of acme-shapes 1\.0 has the wrong kind: .*Shape.*not 3"):
        shapes["number"]

    def is_text(value: object) -> bool:
        """a piece of text"""
        return isinstance(value, str)

    with pytest.raises(BrokenPlugin, match="it must be a piece of text, not 3"):
        Registry[str](GROUP, is_text, "text")["number"]


def test_refresh_sees_what_came_and_what_went(install: Install, shapes: Registry[type[Shape]]) -> None:
    info = install("acme-shapes", f"[{GROUP}]\nsquare = shape_square:Square\n", shape_square=_import_shape("Square"))
    first = shapes["square"]
    install("zeta-shapes", f"[{GROUP}]\nsquare = shape_other:Square\n")
    with pytest.raises(ConflictingPlugins):
        shapes["square"]
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n")
    (info.parent / "zeta_shapes-1.0.dist-info" / "entry_points.txt").unlink()
    refresh()
    with pytest.raises(UnknownPlugin):
        shapes["square"]
    assert issubclass(first, Shape)


def test_registering_in_process(install: Install, shapes: Registry[type[Shape]]) -> None:
    class Circle(Shape):
        pass

    class Ellipse(Shape):
        pass

    assert shapes.register("circle", Circle) is Circle
    shapes.register("circle", Circle)
    with pytest.raises(ConflictingPlugins, match=r"'circle' is already registered in this process.*replace=True"):
        shapes.register("circle", Ellipse)
    assert shapes["circle"] is Circle
    assert shapes.register("circle", Ellipse, replace=True) is shapes["circle"]
    with pytest.raises(BrokenPlugin, match="'number' of this process has the wrong kind"):
        shapes.register("number", 3)  # type: ignore[arg-type]
    shapes.unregister("circle")
    assert "circle" not in shapes
    with pytest.raises(UnknownPlugin, match="no shape 'circle' is registered in this process"):
        shapes.unregister("circle")


def test_registering_over_an_installed_name_must_be_said(install: Install, shapes: Registry[type[Shape]]) -> None:
    install("acme-shapes", f"[{GROUP}]\nsquare = shape_square:Square\n", shape_square=_import_shape("Square"))

    class Mine(Shape):
        pass

    with pytest.raises(ConflictingPlugins, match=r"offered by acme-shapes 1\.0 \(shape_square:Square\).*replace=True"):
        shapes.register("square", Mine)
    installed = shapes["square"]
    assert shapes.register("square", installed) is installed, "the very object that is offered"
    shapes.register("square", Mine, replace=True)
    assert shapes["square"] is Mine
    shapes.unregister("square")
    assert shapes["square"] is installed


def test_a_new_process_finds_the_plugin_without_any_import(install: Install, site: Path) -> None:
    install("acme-shapes", f"[{GROUP}]\nsquare = shape_square:Square\n", shape_square="class Square: pass")
    code = (
        f"from megatron.bridge.registry import Registry; print(Registry({GROUP!r}, type, 'shape')['square'].__name__)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
    assert completed.stdout == "Square\n"


def test_the_registry_is_light() -> None:
    code = "import sys, megatron.bridge.registry; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n"
