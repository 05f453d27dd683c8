"""What a prompt template is, and the registry of templates.

A template is Jinja in the variables of Hugging Face chat templates (`messages`, `tools`, `add_generation_prompt`,
`bos_token`, `eos_token`), with the answers between `{% generation %}` and `{% endgeneration %}`. One variable is added:
`begin` is the token that the tokenizer puts before a text by itself, empty where it puts none.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.data.instruction.messages import ASSISTANT, ROLES, SYSTEM, USER
from megatron.bridge.errors import BridgeError
from megatron.bridge.registry import Registry

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
OWN, CUSTOM = "chat_template", "custom"


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How a conversation is written.

    Attributes:
        name: what to call it in messages.
        jinja: the template.
        roles: the roles that it can write.
        tools: whether it writes tools.
        special_tokens: what must be tokens of the tokenizer; `bos_token` and `eos_token` stand for its own.
        control_tokens: whether special tokens written out in the messages may take effect.
    """

    name: str
    jinja: str
    roles: Sequence[str] = (SYSTEM, USER, ASSISTANT)
    tools: bool = False
    special_tokens: Sequence[str] = ()
    control_tokens: bool = False

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself where the answers are."""
        return _GENERATION.search(self.jinja) is not None


TEMPLATES: Registry[PromptTemplate] = Registry("megatron.bridge.prompt_templates", PromptTemplate, "prompt template")


def prompt_template(name: str, tokenizer: Any, custom: str | None = None) -> PromptTemplate:
    """The template `name`, fit for `tokenizer`.

    Args:
        name: `chat_template` for the tokenizer's own, `custom`, or a name of the registry.
        tokenizer: a transformers tokenizer.
        custom: with `custom`: the template, or a file that holds it.

    Raises:
        BridgeError: unknown, contradictory, or the tokenizer lacks what the template needs.
    """
    if (custom is not None) != (name == CUSTOM):
        raise BridgeError(
            "dataset.custom_template is the template of dataset.prompt_template='custom'; "
            f"it is {'not set' if custom is None else 'set'}, and prompt_template={name!r}"
        )
    if name == OWN:
        return _own(tokenizer)
    template = _custom(custom) if custom is not None else TEMPLATES[name]
    _check_tokens(template, tokenizer)
    return template


def _own(tokenizer: Any) -> PromptTemplate:
    if tokenizer.chat_template is None:
        raise BridgeError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; choose a dataset.prompt_template: "
            f"{', '.join(TEMPLATES)} or {CUSTOM}"
        )
    try:
        jinja = tokenizer.get_chat_template()
    except ValueError as error:  # several templates by name, and none of them the default
        raise BridgeError(f"the tokenizer {tokenizer.name_or_path!r}: {error}") from error
    return PromptTemplate(name=OWN, jinja=jinja, roles=ROLES, tools="tools" in jinja)


def _custom(given: str) -> PromptTemplate:
    is_file = "\n" not in given and "{" not in given
    if is_file and not Path(given).is_file():
        raise BridgeError(f"dataset.custom_template={given!r} is neither a Jinja template nor a file that holds one")
    jinja = Path(given).read_text("utf-8") if is_file else given
    return PromptTemplate(name=CUSTOM, jinja=jinja, roles=ROLES, tools="tools" in jinja)


def _check_tokens(template: PromptTemplate, tokenizer: Any) -> None:
    own = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    known = tokenizer.get_added_vocab()
    missing = [text for text in template.special_tokens if own.get(text, text if text in known else None) is None]
    if missing:
        raise BridgeError(
            f"the template {template.name!r} writes {', '.join(missing)}, which the tokenizer "
            f"{tokenizer.name_or_path!r} has not as a token; choose another dataset.prompt_template, or add the token"
        )
