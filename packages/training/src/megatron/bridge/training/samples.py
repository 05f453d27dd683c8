"""What a model answers while it is trained: greedy answers to fixed prompts after each evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.callbacks import Callback

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import RunState

_FILE = "samples.jsonl"


class GenerationSamples(Callback):
    """Answers prompts, written as the run's data are, after each evaluation: shown, and added to `samples.jsonl`.

    Works at every layout; where the model has no cache of keys and values, each token is a pass over the whole text.

    Args:
        prompts: what a user would say.
        max_new_tokens: longest answer.
    """

    def __init__(self, prompts: Sequence[str], max_new_tokens: int = 48) -> None:
        if isinstance(prompts, str) or not prompts:
            raise BridgeError(f"prompts={prompts!r} must be a list of texts, with at least one")
        self._prompts, self._longest = list(prompts), max_new_tokens
        self.answers: dict[int, list[str]] = {}

    def on_evaluate_end(self, run: "RunState", loss: float) -> None:
        tokenizer, texts = _written(run.cfg, self._prompts)
        answers = [answer(run.model, tokenizer, text, self._longest, run.cfg.model.seq_length) for text in texts]
        self.answers[run.progress.iteration] = answers
        _tell(run, [{"prompt": ask, "answer": said} for ask, said in zip(self._prompts, answers, strict=True)])


def answer(model: list[Any], tokenizer: Any, text: str, max_new_tokens: int, seq_length: int) -> str:
    """The greedy continuation of `text` up to a special token. Collective over the model's ranks.

    Args:
        model: chunks of this rank.
        tokenizer: a transformers tokenizer.
        text: the whole prompt.
        max_new_tokens: longest continuation.
        seq_length: positions that the model has.
    """
    import torch

    from megatron.bridge.models.generation import generate
    from megatron.bridge.platform import device

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = min(max_new_tokens, seq_length - len(ids))
    if room < 1:
        return ""
    prompt, stops = torch.tensor([ids], device=device()), tokenizer.all_special_ids
    said = [int(token[0]) for token in generate(model, prompt, room, stops=stops, vocab_size=len(tokenizer))]
    return str(tokenizer.decode(said, skip_special_tokens=False))


def _written(cfg: "ConfigContainer", prompts: Sequence[str]) -> tuple[Any, list[str]]:
    """The run's tokenizer, and the prompts as its template writes them (as they are, where the data have none)."""
    from megatron.bridge.data.instruction.messages import USER, Message
    from megatron.bridge.data.instruction.rendering import Renderer
    from megatron.bridge.data.instruction.templates import prompt_template
    from megatron.bridge.training.run_data import run_tokenizer

    tokenizer = getattr(run_tokenizer(cfg), "hf_tokenizer", None)
    if tokenizer is None:
        raise BridgeError("samples need a Hugging Face tokenizer; set tokenizer.tokenizer_model to its folder")
    name = getattr(cfg.dataset, "prompt_template", None)
    if name is None:
        return tokenizer, list(prompts)
    template = prompt_template(name, tokenizer, getattr(cfg.dataset, "custom_template", None))
    renderer = Renderer(template, tokenizer, "all")
    return tokenizer, [renderer.prompt([Message(USER, prompt)]) for prompt in prompts]


def _tell(run: "RunState", samples: list[dict[str, str]]) -> None:
    from megatron.bridge import platform

    if not platform.is_rank_zero():
        return
    folder = run.cfg.logger.folder or run.cfg.checkpoint.save
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with (Path(folder) / _FILE).open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"iteration": run.progress.iteration, **sample}, ensure_ascii=False) + "\n")
    if run.cfg.logger.progress:
        for sample in samples:
            print(f"step {run.progress.iteration}: {sample['prompt']!r} -> {sample['answer']!r}")
