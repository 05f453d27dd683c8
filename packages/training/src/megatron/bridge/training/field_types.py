"""Checking values that people write, on a command line or in YAML, against the annotations of dataclass fields.

Values keep to what JSON can say; types that it cannot say have a spelling: dtypes (`bf16`, `torch.bfloat16`),
callables and classes (`torch.nn.functional.silu`), enum members (by name or value).
"""

import dataclasses
import enum
import functools
import importlib
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BeforeValidator, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of numbers: `1e-4` is a float, `on` and `yes` are text."""


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"^[-+]?(?:(?:\d[\d_]*)?\.\d+(?:[eE][-+]?\d+)?|\d[\d_]*\.(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf|\.nan)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_NUMBER), list("-+0123456789."))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse_yaml(text: str) -> Any:
    """YAML with plain rules for numbers and booleans.

    Raises:
        yaml.YAMLError: not YAML.
    """
    return yaml.load(text, Loader=_Loader)


def annotations_of(owner: type) -> dict[str, Any]:
    """Field name -> resolved annotation; a name that cannot be resolved at run time counts as `Any`."""
    return dict(_annotations_of(owner))


@functools.cache
def _annotations_of(owner: type) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(owner) if field.init]
    try:
        hints = typing.get_type_hints(owner)
    except NameError:  # an annotation that exists for type checkers alone
        hints = {field.name: field.type for field in dataclasses.fields(owner)}
        hints = {name: Any if isinstance(hint, str) else hint for name, hint in hints.items()}
    return {name: hints.get(name, Any) for name in names}


def checked(annotation: Any, value: Any) -> Any:
    """`value`, of the annotated type.

    Raises:
        ValueError: it has another type; the message says which one is expected.
    """
    try:
        adapter = _adapter(annotation)
    except PydanticSchemaGenerationError:
        raise ValueError(f"fields of type {readable(annotation)} can only be set in Python") from None
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reasons = list(dict.fromkeys(detail["msg"].removeprefix("Value error, ") for detail in error.errors()))
        raise ValueError(f"expected {readable(annotation)}: {'; '.join(reasons[:3])}") from None
    except TypeError:
        raise ValueError(f"expected {readable(annotation)}, not {value!r}") from None


def checked_text(annotation: Any, text: str) -> Any:
    """`text` from a command line, read as YAML, or as it stands where that has another type (`null` tokenizers, "1.0").

    Raises:
        ValueError: it is not of the annotated type in either reading.
    """
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        value = text
    try:
        return checked(annotation, value)
    except ValueError:
        if isinstance(value, str):
            raise
        try:
            return checked(annotation, text)
        except ValueError:
            pass
        raise


def schema_of(annotation: Any) -> dict[str, Any]:
    """The JSON Schema of an annotation; empty where only Python can say the value."""
    try:
        return _adapter(annotation).json_schema()
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema):
        return {}


def readable(annotation: Any) -> str:
    """An annotation as people write it: `int | None`."""
    if annotation is type(None):
        return "null"
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(readable(part) for part in get_args(annotation))
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_spelled(annotation))


def _spelled(annotation: Any) -> Any:
    """The annotation with a text spelling for every type that JSON lacks."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_spelled(part) for part in parts)]  # noqa: UP007  built at run time
    if _is_dtype(annotation):
        return Annotated[Any, BeforeValidator(_dtype)]
    if annotation is Callable or origin is Callable or annotation is typing.Callable or origin is type:
        return Annotated[Any, BeforeValidator(_imported)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return Annotated[Any, BeforeValidator(functools.partial(_enum_member, annotation))]
    if origin in (list, tuple, dict, set) and parts:
        return origin[tuple(part if part is Ellipsis else _spelled(part) for part in parts)]
    return annotation


def _is_dtype(annotation: Any) -> bool:
    # By name, so that torch is not imported to look at a configuration that has none.
    return isinstance(annotation, type) and (annotation.__module__, annotation.__name__) == ("torch", "dtype")


def _dtype(value: Any) -> Any:
    import torch

    name = str(value).removeprefix("torch.")
    dtype = getattr(torch, _DTYPES.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        # pydantic reports a ValueError as a validation problem and lets a TypeError through.
        raise ValueError(f"{value!r} is no dtype; bf16, fp16, fp32 and torch's names are")  # noqa: TRY004
    return dtype


def _imported(value: Any) -> Any:
    module, _, name = str(value).replace(":", ".").rpartition(".")
    try:
        return functools.reduce(getattr, [name], importlib.import_module(module))
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"{value!r} cannot be imported; write it as module.name") from None


def _enum_member(kind: type[enum.Enum], value: Any) -> enum.Enum:
    for member in kind:
        if value in (member.name, member.value):
            return member
    raise ValueError(f"{value!r} is none of {', '.join(member.name for member in kind)}")
