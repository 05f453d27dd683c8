"""What a quickstart was asked for and what it has done so far, kept in its folder so that it can go on."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.bridge.errors import BridgeError

FILE = "quickstart.json"


@dataclass(frozen=True)
class QuickstartOptions:
    """The choices of one quickstart; see the command's help."""

    hf: Path | None
    text: Path | None
    tp: int
    pp: int
    steps: int
    seq_length: int
    batch: int
    lr: float

    @property
    def ranks(self) -> int:
        """Processes that train."""
        return self.tp * self.pp

    @property
    def layout(self) -> dict[str, Any]:
        """The provider fields of the layout."""
        return {"tensor_model_parallel_size": self.tp, "pipeline_model_parallel_size": self.pp}

    def check(self) -> None:
        """Refuse paths that do not exist, before anything is made.

        Raises:
            BridgeError: names the path.
        """
        if self.hf is not None and not (self.hf / "config.json").is_file():
            raise BridgeError(f"--hf {self.hf}: there is no Hugging Face model folder (no config.json)")
        if self.text is not None and not self.text.exists():
            raise BridgeError(f"--text {self.text}: there is no such file or folder")


@dataclass(frozen=True)
class Step:
    """A finished step: what it was, how long it took, and what proves it."""

    name: str
    seconds: float
    proof: str


@dataclass
class Journal:
    """The folder of a quickstart and the steps done in it."""

    folder: Path
    options: QuickstartOptions
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, options: QuickstartOptions, *, fresh: bool) -> "Journal":
        """Start in an empty folder, or go on in one that was interrupted with the same options.

        Raises:
            BridgeError: the folder holds something else, or a quickstart that is finished or had other options.
        """
        options.check()
        file = folder / FILE
        if fresh and file.is_file():
            shutil.rmtree(folder)
        if not folder.exists() or not any(folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            journal = cls(folder, options)
            journal._write()
            return journal
        if not file.is_file():
            raise BridgeError(f"{folder} exists and is not a quickstart's folder; choose another with --work")
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["options"] != _plain(options):
            raise BridgeError(
                f"{folder} holds a quickstart with other options; repeat those, choose another --work, or pass --fresh"
            )
        return cls(folder, options, [Step(**step) for step in saved["steps"]])

    def done(self, name: str) -> bool:
        """Whether the step was finished, now or before an interruption."""
        return any(step.name == name for step in self.steps)

    def record(self, step: Step) -> None:
        """Keep a finished step."""
        self.steps.append(step)
        self._write()

    def _write(self) -> None:
        content = {"options": _plain(self.options), "steps": [asdict(step) for step in self.steps]}
        unfinished = self.folder / f".{FILE}"
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / FILE)


def _plain(options: QuickstartOptions) -> dict[str, object]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
