"""ShareGPT: `conversations`, each turn with `from` and `value`; perhaps `system` and `tools`."""

from megatron.bridge.data.instruction.fields import Row, list_of, optional_text, text_of
from megatron.bridge.data.instruction.formats.chat import tools_of
from megatron.bridge.data.instruction.messages import ASSISTANT, SYSTEM, TOOL, USER, BadRow, Conversation, Message

_ROLES = {
    "system": SYSTEM,
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "assistant": ASSISTANT,
    "observation": TOOL,
    "tool": TOOL,
}


def sharegpt(row: Row) -> Conversation:
    """A conversation between `human` and `gpt`."""
    turns = [_message(turn) for turn in list_of(row, "conversations")]
    system = optional_text(row, "system")
    return Conversation([Message(SYSTEM, system), *turns] if system else turns, tools_of(row))


def _message(turn: Row) -> Message:
    speaker = text_of(turn, "from")
    if speaker not in _ROLES:
        raise BadRow(f"a turn is from {speaker!r}; known are {', '.join(_ROLES)}")
    return Message(_ROLES[speaker], text_of(turn, "value"), trained=turn.get("weight") != 0)
