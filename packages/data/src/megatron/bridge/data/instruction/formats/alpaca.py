"""Alpaca: `instruction`, perhaps `input` and `system`, and `output`; perhaps `history`, pairs of earlier turns."""

from megatron.bridge.data.instruction.fields import Row, optional_text, text_of
from megatron.bridge.data.instruction.formats.task import history_of, task
from megatron.bridge.data.instruction.messages import Conversation


def alpaca(row: Row) -> Conversation:
    """A task, what it is about, and the answer (Taori et al., 2023)."""
    return task(
        instruction=text_of(row, "instruction"),
        about=optional_text(row, "input"),
        answer=text_of(row, "output"),
        system=optional_text(row, "system"),
        history=history_of(row),
    )
