"""OpenAI's format: `messages`, each with `role` and `content`; perhaps `tools`."""

import json
from collections.abc import Mapping
from typing import Any

from megatron.bridge.data.instruction.fields import Row, field_of, list_of, text_of
from megatron.bridge.data.instruction.messages import BadRow, Conversation, Message

# OpenAI renamed the system role, and calls a tool's answer by its first name.
_ROLES = {"developer": "system", "function": "tool"}


def chat(row: Row) -> Conversation:
    """A conversation; an assistant's message with `"weight": 0` is shown to the model and not trained."""
    return Conversation([message_of(each) for each in list_of(row, "messages")], tools_of(row))


def message_of(row: Row) -> Message:
    """A message of role and content. Content in parts must be text throughout.

    Raises:
        BadRow: a field is missing or of another kind.
    """
    role = text_of(row, "role")
    extra = {name: value for name, value in row.items() if name not in ("role", "content", "weight") and value}
    content = row.get("content") if "tool_calls" in extra else field_of(row, "content")
    weight = row.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow(f"a message has the weight {weight!r}; it must be 0 or 1")
    return Message(_ROLES.get(role, role), _text(content), extra, weight != 0)


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        raise BadRow("the field 'content' holds something other than text; images and sound cannot be trained here")
    return "".join(text_of(part, "text") for part in parts)


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The JSON schemas of `tools`, which may be written as one JSON text (columns of Parquet have one type).

    Raises:
        BadRow: they are no list of objects.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(f"the field 'tools' is a text, but no JSON: {error}") from error
    return None if not tools else [dict(tool) for tool in list_of({"tools": tools}, "tools")]
