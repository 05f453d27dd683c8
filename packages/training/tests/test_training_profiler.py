"""The steps that were asked for are profiled, on the ranks that were asked for; what cannot be is refused."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge import platform
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ProfilingConfig
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.validation import ConfigError


class StopAt(Callback):
    def on_step_end(self, run: Any, result: Any) -> None:
        if run.progress.iteration == 3:
            run.request_stop("enough")


def _profiled(
    make_run: Callable[..., Any], folder: Path, start: int, end: int, ranks: list[int], callbacks: tuple[Any, ...] = ()
) -> None:
    cfg = make_run({}, train_iters=4, global_batch_size=4, folder=str(folder))
    cfg.profiling = ProfilingConfig(
        use_pytorch_profiler=True, profile_step_start=start, profile_step_end=end, profile_ranks=ranks
    )
    pretrain(cfg, forward_step, callbacks)


def _phases(file: Path) -> dict[str, int]:
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert any(str(event["name"]).startswith("aten::") for event in events)
    return {phase: names.count(phase) for phase in ("forward_backward", "data_wait", "optimizer")}


def test_traces_of_a_range_of_steps(make_run: Callable[..., Any], tmp_path: Path) -> None:
    def work() -> None:
        _profiled(make_run, tmp_path / "one", 1, 3, [1])
        _profiled(make_run, tmp_path / "stopped", 2, 9, [0, 1], (StopAt(),))

    run_ranks(2, work, timeout=100)
    one = sorted(file.name for file in (tmp_path / "one" / "profiles").iterdir())
    assert one == ["steps-2-3.rank-1.json.gz"]
    # Two steps, and two micro-batches on each rank.
    found = _phases(tmp_path / "one" / "profiles" / one[0])
    assert found == {"forward_backward": 2, "data_wait": 4, "optimizer": 2}
    # A run that ends before the range does leaves what it has.
    stopped = sorted((tmp_path / "stopped" / "profiles").iterdir())
    assert [file.name for file in stopped] == ["steps-3-9.rank-0.json.gz", "steps-3-9.rank-1.json.gz"]
    assert _phases(stopped[0])["forward_backward"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile_step_start": 3, "profile_step_end": 3}, "profile_step_start=3 must not be negative, and less than"),
        ({"use_pytorch_profiler": True, "profile_step_start": 20, "profile_step_end": 30}, "none would be profiled"),
        ({"use_pytorch_profiler": True, "profile_ranks": [0, 2]}, r"names \[2\], and the ranks are 0 to 0"),
        ({"use_pytorch_profiler": True, "profile_ranks": []}, "must name ranks"),
        ({"use_pytorch_profiler": True, "use_nsys_profiler": True}, "CUDA serves one at a time"),
        ({"use_nsys_profiler": True}, "use_nsys_profiler looks at a CUDA device, and there is none here"),
        ({"record_memory_history": True}, "record_memory_history looks at a CUDA device, and there is none here"),
    ],
)
def test_what_cannot_be_profiled_is_refused(
    settings: dict[str, Any],
    message: str,
    make_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "cuda_available", lambda: False)
    cfg = make_run(folder=str(tmp_path))
    cfg.profiling = ProfilingConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        cfg.validate(1)


def test_a_profile_needs_a_folder(make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    cfg.profiling = ProfilingConfig(use_pytorch_profiler=True)
    with pytest.raises(ConfigError, match=r"set logger\.folder or checkpoint\.save"):
        cfg.validate(1)
