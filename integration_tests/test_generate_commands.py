"""`megatron-bridge generate` and `chat`: transformers' text, from a folder, a checkpoint and with an adapter."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Outcome, in_child
from small_models import save_small_llama, save_small_tokenizer

from megatron.bridge.cli.root import run

NEW = 12
OPTIONS = ("--max-new-tokens", str(NEW))
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("speaks") / "hf"
    save_small_tokenizer(folder)
    save_small_llama(folder, max_position_embeddings=256)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def said_by_transformers(folder: Path, text: str, adapter: Path | None = None) -> str:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=given, max_new_tokens=NEW, do_sample=False)[0]
    new = [token for token in out[given.shape[1] :].tolist() if token != tokenizer.eos_token_id]
    return str(tokenizer.decode(new))


def test_a_folder_and_a_checkpoint_speak_as_in_transformers(
    folder: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    text, other = "def forward(self", "import torch"
    (tmp_path / "prompts.txt").write_text(f"{other}\n")
    ended = cli("generate", folder, text, "--prompts-file", "prompts.txt", "--json", *OPTIONS, folder=tmp_path)
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["prompt"] for row in rows] == [text, other]
    assert [row["text"] for row in rows] == [said_by_transformers(folder, each) for each in (text, other)]

    assert cli("convert", "import", folder, "megatron", "--offline", folder=tmp_path).code == 0
    ended = cli("generate", "megatron", text, "--tp", "2", *OPTIONS, folder=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out == f"{text}{rows[0]['text']}\n"


def test_an_adapter_speaks_as_in_peft(folder: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(folder)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(str(tmp_path / "adapter"))
    ended = cli("generate", folder, "def", "--adapter", "adapter", "--json", *OPTIONS, folder=tmp_path)
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)["text"]
    assert said == said_by_transformers(folder, "def", tmp_path / "adapter")
    assert said != said_by_transformers(folder, "def")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_turn_has_all_turns_before_it(folder: Path, tmp_path: Path, ranks: int) -> None:
    (tmp_path / "turns").write_text("hello\n\nagain\n")

    def talk() -> int:
        os.dup2(os.open("turns", os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        return run(["chat", str(folder), "--system", "be kind", "--tp", str(ranks), *OPTIONS])

    ended = in_child(talk, tmp_path, tmp_path / "outputs")
    assert ended.code == 0, ended.err
    start = "[system]be kind[user]hello[assistant]"
    first = said_by_transformers(folder, start)
    second = said_by_transformers(folder, f"{start}{first}[user]again[assistant]")
    assert ended.out == f"> {first}\n> > {second}\n> "


def test_what_cannot_be_said_is_refused(folder: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    save_small_llama(tmp_path / "mute")
    save_small_tokenizer(tmp_path / "plain")
    save_small_llama(tmp_path / "plain")
    for words, code, told in (
        (["generate", folder], 2, "no prompt"),
        (["generate", folder, "a", "--top-k", "3"], 1, "set a temperature"),
        (["generate", folder, "a", "--max-new-tokens", "400"], 1, "256 positions"),
        (["generate", folder, "--prompts-file", "nowhere.txt"], 1, "nowhere.txt"),
        (["generate", "mute", "a"], 1, "has no tokenizer"),
        (["chat", "plain"], 1, "no chat template"),
    ):
        ended = cli(*words, folder=tmp_path)
        assert (ended.code, told in ended.err) == (code, True), (words, ended)
