"""A reader who follows a document: every block in its order, in one folder with a model and a project in it."""

import atexit
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from forked import Outcome, in_child
from readme_blocks import Block, promises
from small_models import REPOSITORY, save_small_llama, save_small_tokenizer

from megatron.bridge.cli.root import run
from megatron.bridge.registry import refresh
from megatron.bridge.testing import run_ranks

NOT_RUN = "not run: "
# Like diff(1) these exit with 1 where there are differences, and there are some between what documents compare.
TELL_DIFFERENCES = (["megatron-bridge", "recipes", "diff"], ["megatron-bridge", "config", "diff"])

# What takes long is made short; nothing else is changed.
MORE_OPTIONS = {"megatron-bridge quickstart": "--steps 4 --seq-length 32 --batch 4"}
SHORTER = {"train_iters = 10_000": "train_iters = 2", "seq_length=8192": "seq_length=32"}
SMALLER = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4} | {
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 512,
}


class Reader:
    """A reader who follows a document from its top.

    Args:
        document: its blocks, in order.
        folder: where the reader works.
        outputs: where scripts and outputs go.
    """

    def __init__(self, document: list[Block], folder: Path, outputs: Path) -> None:
        self.document = document
        self.folder = folder
        self.outputs = outputs
        self.done = 0
        self.installed = outputs / "site-packages"
        shutil.copytree(small_llama_of_many_heads(), folder / "meta-llama/Llama-3.2-1B")
        shutil.copytree(REPOSITORY / "packages/data/src", folder / "my_project")

    def read_to(self, block: Block) -> None:
        """Run every block up to this one that has not been run."""
        last = self.document.index(block)
        while self.done <= last:
            self.done += 1
            self._follow(self.document[self.done - 1])

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
            ended = in_child(
                self._knowing(lambda: _run_script(script, self.folder)), self.folder, self.outputs / block.name
            )
            assert ended.code == 0, ended.err

    def _run_command(self, words: list[str], promised: str) -> None:
        words = words[2:] if words[:2] == ["uv", "run"] else words
        if words[:3] == ["uv", "pip", "install"]:
            build_and_unpack(self.folder / words[3], self.outputs / "wheels", self.installed)
            return
        if words[0] == "megatron-bridge":
            ended = self._megatron_bridge(words[1:])
        else:
            assert words[0] in ("torchrun", "cp", "truncate", "printf"), (
                f"the document runs {words}: mark it or allow it"
            )
            ended = self._elsewhere(words)
        expected = 1 if "error: " in promised or words[:3] in TELL_DIFFERENCES else 0
        assert ended.code == expected, f"{shlex.join(words)}\n{ended.out}\n{ended.err}"
        if promised:
            assert promises(promised, ended.out + ended.err), f"promised:\n{promised}\nwritten:\n{ended.out}{ended.err}"

    def _megatron_bridge(self, words: list[str]) -> Outcome:
        more = shlex.split(MORE_OPTIONS.get(shlex.join(["megatron-bridge", *words]), ""))
        self.last = in_child(self._knowing(lambda: run([*words, *more])), self.folder, self.outputs / words[0])
        return self.last

    def _knowing(self, function: Callable[[], int]) -> Callable[[], int]:
        """`function` for a child in which the packages are there that the document has installed."""

        def call() -> int:
            if self.installed.is_dir():
                sys.path.insert(0, str(self.installed))
                refresh()
            return function()

        return call

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


@cache
def small_llama_of_many_heads() -> Path:
    """A folder with a small model that has as many heads as the one that the documents name, made once."""
    root = tempfile.mkdtemp(prefix="small-llama-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = Path(root) / "model"
    save_small_tokenizer(folder)
    save_small_llama(folder, hidden_size=256, num_attention_heads=32, num_key_value_heads=8)
    return folder


def build_and_unpack(package: Path, wheels: Path, site: Path) -> None:
    """What `uv pip install PACKAGE` does for a package without anything compiled, into the folder `site`."""
    uv = shutil.which("uv")
    assert uv, "uv is what runs this repository"
    # uv builds its own backend's packages itself: nothing is downloaded.
    built = subprocess.run(
        [uv, "build", "--offline", "--wheel", "-o", str(wheels), str(package)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(wheels.glob(f"{package.name.replace('-', '_')}-*.whl"))) as wheel:
        wheel.extractall(site)


def _shortened(body: str) -> str:
    for long, short in SHORTER.items():
        body = body.replace(long, short)
    return body


def _run_script(script: Path, folder: Path) -> int:
    from megatron.bridge.recipes.base import building

    published = building.provider_of

    def smaller(description: Any, fields: Any) -> Any:
        model = published(description, fields)
        return model.replace(**SMALLER) if description.home == "meta-llama/Llama-3.2-1B" else model

    building.provider_of = smaller
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # as where a script lies beside the files that it imports
    runpy.run_path(str(script), run_name="__main__")
    return 0


def runnable(document: list[Block]) -> list[Block]:
    """The blocks that are run: those of a language, without a note that says why not."""
    return [block for block in document if block.language != "text" and not block.note.startswith(NOT_RUN)]


def unexplained(document: list[Block]) -> list[Block]:
    """Blocks whose note is neither a number of ranks nor a reason for not being run."""
    return [
        block
        for block in document
        if not (block.note == "" or block.ranks > 1 or re.fullmatch(rf"{NOT_RUN}\w.{{10,}}", block.note))
    ]
