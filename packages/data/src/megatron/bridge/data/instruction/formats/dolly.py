"""Dolly: `instruction`, perhaps `context`, and `response`."""

from megatron.bridge.data.instruction.fields import Row, optional_text, text_of
from megatron.bridge.data.instruction.formats.task import task
from megatron.bridge.data.instruction.messages import Conversation


def dolly(row: Row) -> Conversation:
    """A task, what it is about, and the answer (Conover et al., 2023)."""
    return task(
        instruction=text_of(row, "instruction"), about=optional_text(row, "context"), answer=text_of(row, "response")
    )
