"""Prompt templates by name: how a conversation is written, and which part of it are the answers."""

from megatron.bridge.data.instruction.templates.base import TEMPLATES as TEMPLATES
from megatron.bridge.data.instruction.templates.base import PromptTemplate as PromptTemplate
from megatron.bridge.data.instruction.templates.base import prompt_template as prompt_template
