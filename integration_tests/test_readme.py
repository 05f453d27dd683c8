"""The README is executed, block by block in its order, in one folder; what is not run says why."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Outcome, in_child
from readme_blocks import README, Block, blocks, promises
from small_models import REPOSITORY, save_small_llama, save_small_tokenizer

from megatron.bridge.cli.root import run
from megatron.bridge.testing import run_ranks

BLOCKS = blocks(README.read_text("utf-8"))
NOT_RUN = "not run: "
RUN = [block for block in BLOCKS if block.language != "text" and not block.note.startswith(NOT_RUN)]

# What takes long is made short; nothing else is changed.
MORE_OPTIONS = {"megatron-bridge quickstart": "--steps 4 --seq-length 32 --batch 4"}
SHORTER = {"train_iters = 10_000": "train_iters = 2", "seq_length=8192": "seq_length=32"}
SMALLER = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4} | {
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 512,
}


class Reader:
    """A reader who follows the README from its top, in a folder with a model and a project in it."""

    def __init__(self, folder: Path, outputs: Path) -> None:
        self.folder = folder
        self.outputs = outputs
        self.done = 0
        save_small_tokenizer(folder / "meta-llama/Llama-3.2-1B")
        # As many heads as the model that the README names.
        sizes = {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 8}
        save_small_llama(folder / "meta-llama/Llama-3.2-1B", **sizes)
        shutil.copytree(REPOSITORY / "packages/data/src", folder / "my_project")

    def read_to(self, block: Block) -> None:
        """Run every block up to this one that has not been run."""
        last = BLOCKS.index(block)
        while self.done <= last:
            self.done += 1
            self._follow(BLOCKS[self.done - 1])

    def _follow(self, block: Block) -> None:
        if block.file:
            target = self.folder / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.body, "utf-8")
        if block.note.startswith(NOT_RUN) or "/" in (block.file or ""):
            return
        if block.language == "python":
            self._run_python(block)
        if block.language in ("sh", "console"):
            for words, output in block.commands:
                self._run_command(words, output)

    def _run_python(self, block: Block) -> None:
        script = self.outputs / f"{block.name}.py"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(_shortened(block.body), "utf-8")
        if block.ranks > 1:
            assert run_ranks(block.ranks, _run_script, script, self.folder, timeout=120) == [0] * block.ranks
        else:
            ended = in_child(lambda: _run_script(script, self.folder), self.folder, self.outputs / block.name)
            assert ended.code == 0, ended.err

    def _run_command(self, words: list[str], promised: str) -> None:
        words = words[2:] if words[:2] == ["uv", "run"] else words
        if words[0] == "megatron-bridge":
            ended = self._megatron_bridge(words[1:])
        else:
            assert words[0] in ("torchrun", "cp", "truncate", "printf"), f"the README runs {words}: mark it or allow it"
            ended = self._elsewhere(words)
        assert ended.code == (1 if "error: " in promised else 0), f"{shlex.join(words)}\n{ended.out}\n{ended.err}"
        if promised:
            assert promises(promised, ended.out + ended.err), f"promised:\n{promised}\nwritten:\n{ended.out}{ended.err}"

    def _megatron_bridge(self, words: list[str]) -> Outcome:
        more = shlex.split(MORE_OPTIONS.get(shlex.join(["megatron-bridge", *words]), ""))
        self.last = in_child(lambda: run([*words, *more]), self.folder, self.outputs / words[0])
        return self.last

    def _elsewhere(self, words: list[str]) -> Outcome:
        # The words' first is the script of the same name in this environment; a redirection needs a shell.
        line = re.sub(r"'>'", ">", shlex.join(words))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        return Outcome(ended.returncode, ended.stdout, ended.stderr)


def _shortened(body: str) -> str:
    for long, short in SHORTER.items():
        body = body.replace(long, short)
    return body


def _run_script(script: Path, folder: Path) -> int:
    import megatron.bridge.recipes.llama.llama32_1b as recipe

    published: Callable[[int], Any] = recipe.model
    recipe.model = lambda seq_length: published(seq_length).replace(**SMALLER)  # type: ignore[assignment]
    os.chdir(folder)
    runpy.run_path(str(script), run_name="__main__")
    return 0


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("reader"), tmp_path_factory.mktemp("outputs"))


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.name)
def test_block(reader: Reader, block: Block) -> None:
    reader.read_to(block)


def test_the_reader_ends_with_what_the_readme_promises(reader: Reader) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader.read_to(BLOCKS[-1])
    for folder in ("exported_model", "hf_output", "trained_model", "exported"):
        AutoModelForCausalLM.from_pretrained(reader.folder / folder)
        AutoTokenizer.from_pretrained(reader.folder / folder)
    assert '"passed": true' in (reader.folder / "certificate.json").read_text()
    assert not (reader.folder / "refused").exists()
    assert not list((reader.folder / "data").glob("bad*"))


def test_every_kind_of_block_is_known_and_every_omission_says_why() -> None:
    assert {block.language for block in BLOCKS} == {"python", "sh", "console", "yaml", "toml", "text"}
    for block in BLOCKS:
        assert block.note == "" or block.ranks > 1 or re.fullmatch(rf"{NOT_RUN}\w.{{10,}}", block.note), block
    assert all(block.file for block in BLOCKS if block.language in ("yaml", "toml"))
    assert len(RUN) >= 20


def test_links_lead_somewhere() -> None:
    text = README.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (REPOSITORY / target).exists(), target
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings, anchor


def test_the_table_of_the_quickstart_is_the_one_it_prints(reader: Reader) -> None:
    (shown,) = [block.body for block in BLOCKS if block.language == "text"]
    reader.read_to(next(block for block in BLOCKS if "quickstart" in block.body))
    printed = (reader.outputs / "quickstart" / "stdout").read_text("utf-8")
    assert _steps(shown) == _steps(printed)
    assert len(_steps(shown)) >= 7


def _steps(table: str) -> list[str]:
    """First cells of the rows of a drawn table, numbers aside."""
    cells = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    return [re.sub(r"\d+", "N", cell) for cell in cells if cell]
