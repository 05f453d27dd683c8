"""Pairs of a better and a worse answer: `prompt`, `chosen`, `rejected`; or the last two, whole conversations."""

import dataclasses
from collections.abc import Iterator, Sequence

from megatron.bridge.data.instruction.fields import Row, field_of, list_of, text_of
from megatron.bridge.data.instruction.formats.base import DatasetFormat
from megatron.bridge.data.instruction.formats.chat import message_of, tools_of
from megatron.bridge.data.instruction.messages import ASSISTANT, USER, BadRow, Conversation, Message


class Preference(DatasetFormat):
    """Two conversations per row, first the chosen one; what they have in common is not trained.

    Prompt and answers are texts, or lists of messages.
    """

    def conversations(self, rows: Sequence[Row]) -> Iterator[Conversation]:
        (row,) = rows
        chosen, rejected = (_messages(row, name) for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise BadRow("'chosen' and 'rejected' are the same; there is nothing to prefer")
        prompt = _prompt(row) if "prompt" in row else []
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        for answer in (chosen, rejected):
            untrained = [dataclasses.replace(message, trained=False) for message in [*prompt, *answer[:shared]]]
            yield Conversation([*untrained, *answer[shared:]], tools_of(row))


def _messages(row: Row, name: str) -> list[Message]:
    if isinstance(field_of(row, name), str):
        return [Message(ASSISTANT, text_of(row, name))]
    return [message_of(each) for each in list_of(row, name)]


def _prompt(row: Row) -> list[Message]:
    if isinstance(row["prompt"], str):
        return [Message(USER, row["prompt"])]
    return [message_of(each) for each in list_of(row, "prompt")]
