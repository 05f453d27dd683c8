"""`prompt` and `completion`: two texts, or two lists of messages. Answers within the prompt are not trained."""

import dataclasses

from megatron.bridge.data.instruction.fields import Row, field_of, list_of, text_of
from megatron.bridge.data.instruction.formats.chat import message_of, tools_of
from megatron.bridge.data.instruction.messages import ASSISTANT, USER, Conversation, Message


def prompt_completion(row: Row) -> Conversation:
    """A prompt and what completes it; with the template `plain`, the texts exactly as they are."""
    if isinstance(field_of(row, "prompt"), str):
        return Conversation([Message(USER, text_of(row, "prompt")), Message(ASSISTANT, text_of(row, "completion"))])
    given = [dataclasses.replace(message_of(each), trained=False) for each in list_of(row, "prompt")]
    return Conversation([*given, *(message_of(each) for each in list_of(row, "completion"))], tools_of(row))
