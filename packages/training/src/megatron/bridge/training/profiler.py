"""Profiling a range of a run's steps on some of its ranks, each into a file of its own (`ProfilingConfig`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron.bridge import platform

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.phases import Phases


class Profiler:
    """Profiles the steps that the configuration names; use it as a context manager around the loop.

    Args:
        cfg: the run's configuration.
        phases: of this rank; they are marked in the profile.
    """

    def __init__(self, cfg: "ConfigContainer", phases: "Phases") -> None:
        self._settings, self._folder, self._phases = cfg.profiling, folder_of(cfg), phases
        self._open = contextlib.ExitStack()
        self._waits = bool(tools_of(cfg)) and platform.rank() in cfg.profiling.profile_ranks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Around a step, `done` of them having been done before."""
        settings = self._settings
        if self._waits and settings.profile_step_start <= done < settings.profile_step_end:
            self._start(done)
        yield
        if done + 1 == settings.profile_step_end:
            self._stop()

    def _start(self, done: int) -> None:
        self._waits = False
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = self._settings
        name = f"steps-{done + 1}-{settings.profile_step_end}.rank-{platform.rank()}"
        self._phases.marked = True
        self._open.callback(setattr, self._phases, "marked", False)
        if settings.use_pytorch_profiler:
            self._open.enter_context(_trace(self._folder / f"{name}.json.gz", settings.record_shapes))
        if settings.use_nsys_profiler:
            from megatron.bridge.platform.profiling import nsys_range

            self._open.enter_context(nsys_range(settings.record_shapes))
        if settings.record_memory_history:
            from megatron.bridge.platform.profiling import memory_history

            self._open.enter_context(memory_history(self._folder / f"{name}.memory.pickle"))

    def _stop(self) -> None:
        self._open.close()


@contextlib.contextmanager
def _trace(file: Path, record_shapes: bool) -> Iterator[None]:
    """torch's profiler; the trace is for https://ui.perfetto.dev or chrome://tracing."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if platform.cuda_available() else [])]
    with profile(activities=activities, record_shapes=record_shapes) as profiler:
        yield
    profiler.export_chrome_trace(str(file))


def folder_of(cfg: "ConfigContainer") -> Path | None:
    """Where profiles go; None where there is no folder for them."""
    base = cfg.logger.folder or cfg.checkpoint.save
    return None if base is None else Path(base) / "profiles"


def tools_of(cfg: "ConfigContainer") -> list[str]:
    """The settings that ask for a profile."""
    names = ("use_pytorch_profiler", "use_nsys_profiler", "record_memory_history")
    return [name for name in names if getattr(cfg.profiling, name)]


def profiling_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """What is wrong with the section on its own."""
    settings, tools = cfg.profiling, tools_of(cfg)
    if not 0 <= settings.profile_step_start < settings.profile_step_end:
        yield (
            f"profiling.profile_step_start={settings.profile_step_start} must not be negative, and less than "
            f"profiling.profile_step_end={settings.profile_step_end}"
        )
    elif tools and settings.profile_step_start >= cfg.train.total_iters > 0:
        yield (
            f"profiling.profile_step_start={settings.profile_step_start}: of the run's {cfg.train.total_iters} steps "
            "none would be profiled"
        )
    if tools and (not settings.profile_ranks or min(settings.profile_ranks) < 0):
        yield f"profiling.profile_ranks={settings.profile_ranks} must name ranks, from 0 on"
    if tools and folder_of(cfg) is None:
        yield f"profiling.{tools[0]} needs a folder for its files; set logger.folder or checkpoint.save"
    if "use_pytorch_profiler" in tools and "use_nsys_profiler" in tools:
        yield "profiling.use_pytorch_profiler and use_nsys_profiler are both set; CUDA serves one at a time, keep one"


def machine_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """What this machine cannot profile."""
    cuda_only = [name for name in tools_of(cfg) if name != "use_pytorch_profiler"]
    if cuda_only and not platform.cuda_available():
        for name in cuda_only:
            yield (
                f"profiling.{name} looks at a CUDA device, and there is none here; profiling.use_pytorch_profiler "
                "works on a CPU"
            )


def rank_problems(cfg: "ConfigContainer", world_size: int) -> Iterator[str]:
    """Ranks to profile that the world does not have."""
    absent: list[Any] = [rank for rank in cfg.profiling.profile_ranks if rank >= world_size]
    if tools_of(cfg) and absent:
        yield f"profiling.profile_ranks names {absent}, and the ranks are 0 to {world_size - 1}"
