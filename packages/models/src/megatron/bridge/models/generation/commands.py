"""`megatron-bridge generate` and `megatron-bridge chat`."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron.bridge.conversion.layout_options import layout_options, ranks_of
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.generation.choice import Choice

if TYPE_CHECKING:
    from megatron.bridge.models.generation.speaker import Speaker

_OPTIONS = (
    click.option("--adapter", help="A folder that Hugging Face peft wrote, to answer with."),
    click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer."),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token."),
    click.option("--top-k", type=int, help="Draw from so many of the most likely tokens."),
    click.option("--top-p", type=float, help="Draw from the most likely tokens with this probability together."),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="1 changes nothing."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn."),
    click.option("--trust-remote-code", is_flag=True, help="Run the code that the model ships."),
)


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which model answers, at which layout, and how tokens are chosen: `model` and `choice` reach the command."""

    @functools.wraps(command)
    def with_options(
        *args: Any,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        repetition_penalty: float,
        seed: int,
        **options: Any,
    ) -> Any:
        return command(*args, choice=Choice(temperature, top_k, top_p, repetition_penalty, seed), **options)

    for option in reversed(_OPTIONS):
        with_options = option(with_options)
    return click.argument("model")(layout_options(with_options))


@click.command()
@_model_options
@click.argument("prompts", nargs=-1)
@click.option("--prompts-file", type=click.Path(path_type=Path), help="A prompt on each line, after those given.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each prompt.")
def generate(
    model: str,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    as_json: bool,
    layout: dict[str, int],
    **options: Any,
) -> None:
    """Continue each of PROMPTS with MODEL: a Hugging Face folder, a hub id or a Megatron checkpoint."""
    texts = [*prompts, *(_lines(prompts_file) if prompts_file else ())]
    if not texts:
        raise click.UsageError("no prompt: give one, or --prompts-file")
    _run(ranks_of(layout), _continue, model, texts, as_json, layout, options)


@click.command()
@_model_options
@click.option("--system", help="What the model is told before the first turn.")
def chat(model: str, system: str | None, layout: dict[str, int], **options: Any) -> None:
    """Talk with MODEL: a line is a turn, and the end of the input ends the conversation."""
    # Forked ranks are without the standard input, and have what is beside it.
    _run(ranks_of(layout), _converse, model, system, os.dup(sys.stdin.fileno()), layout, options)


def _run(ranks: int, function: Callable[..., Any], *args: Any) -> None:
    from megatron.bridge.platform.engine import import_engine
    from megatron.bridge.platform.launch import run_layout

    import_engine()
    run_layout(ranks, function, *args)


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BridgeError(f"the prompts cannot be read: {error}") from error


def _opened(model: str, layout: dict[str, int], options: dict[str, Any]) -> "Speaker":
    from megatron.bridge.models.generation.speaker import Speaker

    return Speaker.opened(model, options.pop("adapter"), trust_remote_code=options.pop("trust_remote_code"), **layout)


def _continue(model: str, texts: list[str], as_json: bool, layout: dict[str, int], options: dict[str, Any]) -> None:
    speaker = _opened(model, layout, options)
    for text in texts:
        tokens = speaker.continuation(text, **options)
        if as_json:
            said = list(tokens)
            found = {"prompt": text, "text": speaker.tokenizer.decode(said), "tokens": said}
            _say(json.dumps(found, ensure_ascii=False) + "\n")
        else:
            _say(text)
            _shown(speaker, tokens)


def _converse(model: str, system: str | None, told: int, layout: dict[str, int], options: dict[str, Any]) -> None:
    speaker = _opened(model, layout, options)
    speaker.refuse_without_template()
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in _turns(told):
        messages.append({"role": "user", "content": line})
        said = _shown(speaker, speaker.answer(messages, **options))
        messages.append({"role": "assistant", "content": said})


def _turns(told: int) -> Iterator[str]:
    """The user's turns, on every rank as rank 0 reads them."""
    import torch.distributed as dist

    from megatron.bridge.platform import is_rank_zero

    with os.fdopen(told, encoding="utf-8") as lines:
        while True:
            _say("> ")
            line = [lines.readline() if is_rank_zero() else None]
            dist.broadcast_object_list(line)
            if not line[0]:
                return
            if line[0].strip():
                yield line[0].rstrip("\n")


def _shown(speaker: "Speaker", tokens: Iterator[int]) -> str:
    """Write the text as it comes; returns all of it."""
    said: list[int] = []
    shown = ""
    for token in tokens:
        said.append(token)
        text = speaker.tokenizer.decode(said)
        # A character of several tokens is written when all of them are there.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            _say(text[len(shown) :])
            shown = text
    text = str(speaker.tokenizer.decode(said))
    _say(text[len(shown) :] + "\n")
    return text


def _say(text: str) -> None:
    from megatron.bridge.platform import is_rank_zero

    if is_rank_zero():
        sys.stdout.write(text)
        sys.stdout.flush()
