"""The arguments in a launch script of Megatron-LM, as bash itself understands it, without running anything.

The script is read by bash in its restricted mode, which starts no program by path, writes no file and changes no
folder; the search path is empty, and what would start ranks is a function that writes down its arguments.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron.bridge.errors import BridgeError

_SECONDS = 10.0
_STARTERS = ("torchrun", "python", "python3", "srun", "mpirun", "deepspeed", "accelerate", "nohup", "env", "exec")
# Records are parted by two zero bytes, words by one.
_PRELUDE = """\
note() {{ printf '%s\\0' "$@" '' >&{descriptor}; }}
{starters}
command_not_found_handle() {{ return 0; }}
PATH={nowhere}
"""
_SIZES = {
    "ranks": re.compile(r"--nproc[-_]per[-_]node|--ntasks-per-node"),
    "nodes": re.compile(r"--nnodes|--nodes|-N"),
}


@dataclass(frozen=True)
class Launched:
    """What a script would start.

    Attributes:
        words: Megatron-LM's arguments.
        ranks_per_node, nodes: as torchrun or srun is told; None where they are not.
    """

    words: tuple[str, ...]
    ranks_per_node: int | None = None
    nodes: int | None = None

    @property
    def world_size(self) -> int | None:
        """Number of ranks, where it is known."""
        return None if self.ranks_per_node is None else self.ranks_per_node * (self.nodes or 1)


def launched_by(file: Path, arguments: Sequence[str] = ()) -> Launched:
    """What a script would start, called with `arguments`.

    Raises:
        BridgeError: it cannot be read, or does not start one training.
    """
    found = [each for each in map(_launched, _commands(file, arguments)) if each is not None]
    if len(found) != 1:
        raise BridgeError(
            f"{file} starts {len(found)} trainings (a Python file with --num-layers or --micro-batch-size); give the "
            "arguments themselves: megatron-bridge migrate megatron-lm -- --num-layers ..."
        )
    return found[0]


def _commands(file: Path, arguments: Sequence[str]) -> list[list[str]]:
    """The words of every command that would start ranks."""
    bash = shutil.which("bash")
    if bash is None:
        raise BridgeError("scripts are read by bash, which is not there; give the arguments themselves")
    if not file.is_file():
        raise BridgeError(f"there is no file {file}")
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as noted:
        prelude = Path(place) / "prelude"
        starters = "\n".join(f'{name}() {{ note "$@"; }}' for name in _STARTERS)
        prelude.write_text(
            _PRELUDE.format(descriptor=noted.fileno(), starters=starters, nowhere=Path(place) / "nowhere"), "utf-8"
        )
        try:
            ended = subprocess.run(
                [bash, "--restricted", str(file), *arguments],
                env={**os.environ, "BASH_ENV": str(prelude)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=(noted.fileno(),),
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BridgeError(f"{file} does not end within {_SECONDS:.0f} s; give the arguments themselves") from error
        noted.seek(0)
        text = noted.read().decode()
    if not text and ended.returncode:
        raise BridgeError(f"bash cannot read {file}: {ended.stderr.decode().strip()}")
    return [record.split("\0") for record in text.split("\0\0") if record]


def _launched(words: list[str]) -> Launched | None:
    """The training that a command starts, None where it is none."""
    place = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    if place is None:
        return None
    before, behind = words[:place], tuple(words[place + 1 :])
    if not {"--num-layers", "--micro-batch-size"} & {word.partition("=")[0] for word in behind}:
        return None
    sizes = {name: _size(before, option) for name, option in _SIZES.items()}
    return Launched(behind, sizes["ranks"], sizes["nodes"])


def _size(words: list[str], option: re.Pattern[str]) -> int | None:
    """What follows an option; where srun starts torchrun, torchrun's, which stands last."""
    found = None
    for word, following in pairwise([*words, ""]):
        name, separator, value = word.partition("=")
        if option.fullmatch(name):
            found = value if separator else following
    return int(found) if found is not None and found.isdigit() else None
