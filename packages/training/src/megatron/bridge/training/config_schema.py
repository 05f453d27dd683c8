"""A JSON Schema (draft 2020-12) of a configuration's sections."""

import dataclasses
from typing import Any

from megatron.bridge.training.field_types import annotations_of, readable, schema_of
from megatron.bridge.training.run_config import plain


def json_schema(section: Any, title: str = "Megatron Bridge run") -> dict[str, Any]:
    """The schema of a section and those within it; keys that nobody knows are refused, as everywhere.

    Args:
        section: a configuration, or a part of one; its present values are the schema's defaults.
        title: of the schema.
    """
    annotations = annotations_of(type(section))
    properties: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        if not field.init:
            continue
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            properties[field.name] = json_schema(value, type(value).__name__)
        else:
            properties[field.name] = _field(annotations[field.name], value)
    return {"title": title, "type": "object", "properties": properties, "additionalProperties": False}


def _field(annotation: Any, value: Any) -> dict[str, Any]:
    found = schema_of(annotation)
    found.pop("title", None)
    return {**found, "default": plain(value), "description": readable(annotation)}
