"""Saves in the background, saves that fail, and files that are damaged afterwards."""

import errno
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron.bridge.conversion.checkpoint_layout import LATEST_POINTER, iteration_folder, saved_iterations
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import RankFailed, run_ranks
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.newest_whole import newest_whole
from megatron.bridge.training.pretrain import pretrain

DISTRIBUTED = {"use_distributed_optimizer": True}


def _everything(folder: Path) -> dict[str, Any]:
    """All that a checkpoint holds, read by Megatron-Core."""
    from megatron.core.dist_checkpointing.serialization import load_plain_tensors

    return dict(load_plain_tensors(str(folder)))


def _same(one: Any, other: Any) -> bool:
    return bool(torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other)


class Steps(Callback):
    """Notes steps and saves in order, and lets the writers go on after the step `release`."""

    def __init__(self, release: int) -> None:
        self.seen: list[str] = []
        self._release, self.released = release, threading.Event()

    def on_step_end(self, run: Any, result: Any) -> None:
        self.seen.append(f"step {run.progress.iteration}")
        if run.progress.iteration == self._release:
            self.released.set()

    def on_save(self, run: Any, folder: Path) -> None:
        self.seen.append(f"saved {folder.name}")


def test_what_is_saved_in_the_background_is_the_step_that_was_saved(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    """The writers of step 2 are held up until step 4 is done; the weights have moved on by then."""
    settings = {"train_iters": 6, "save_interval": 2} | DISTRIBUTED

    def work() -> list[str]:
        pretrain(make_run(save=str(tmp_path / "once"), **settings), forward_step)
        steps, create_stream = Steps(4), FileSystem.create_stream

        def held_up(self: Any, path: Any, mode: str) -> Any:
            if "iter_0000002" in str(path) and mode == "wb":
                assert steps.released.wait(60)
            return create_stream(self, path, mode)

        FileSystem.create_stream = held_up  # type: ignore[method-assign, assignment]
        pretrain(make_run(save=str(tmp_path / "meanwhile"), async_save=True, **settings), forward_step, [steps])
        return steps.seen

    def differing() -> list[str]:
        problems = []
        for iteration in (2, 4, 6):
            one, other = (_everything(iteration_folder(tmp_path / name, iteration)) for name in ("once", "meanwhile"))
            assert one.keys() == other.keys()
            assert any(key.startswith("optimizer.state.exp_avg") for key in one)
            problems += [key for key in one if not _same(one[key], other[key])]
        return problems

    for seen in run_ranks(2, work):
        assert seen.index("step 4") < seen.index("saved iter_0000002") < seen.index("step 5")
        assert [entry for entry in seen if "saved" in entry] == [f"saved iter_000000{step}" for step in (2, 4, 6)]
        assert seen[-1] == "saved iter_0000006"
    assert run_ranks(1, differing) == [[]]


@pytest.mark.parametrize(
    ("in_background", "go_on"), [(False, False), (True, True)], ids=["at once", "in the background"]
)
def test_a_save_that_fails_is_tried_again(
    in_background: bool, go_on: bool, make_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Rank 1 finds the disk full: once at step 1, each time at step 2."""

    def work() -> tuple[int, list[int]]:
        tried: list[int] = []
        create_stream = FileSystem.create_stream

        def full(self: Any, path: Any, mode: str) -> Any:
            if mode == "wb" and Path(path).name.startswith("__1_"):
                step = int(Path(path).parent.name.split("_")[1].split(".")[0])
                tried.append(step)
                if step == 2 or tried == [1]:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return create_stream(self, path, mode)

        FileSystem.create_stream = full  # type: ignore[method-assign, assignment]
        settings = {"save": str(tmp_path), "save_interval": 1, "save_retries": 1, "go_on_without": go_on}
        cfg = make_run({"tensor_model_parallel_size": 2}, train_iters=3, async_save=in_background, **settings)
        return pretrain(cfg, forward_step).iteration, tried

    if go_on:
        assert run_ranks(2, work)[1] == (3, [1, 1, 2, 2, 3])
        assert saved_iterations(tmp_path) == [1, 3]
    else:
        with pytest.raises(RankFailed, match="No space left on device"):
            run_ranks(2, work)
        assert saved_iterations(tmp_path) == [1]
    assert not list(tmp_path.glob(".iter_*"))


def _flip(file: Path, at: float) -> None:
    """One bit, at a fraction of the file."""
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    file.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found_and_the_checkpoint_before_is_used(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    place = {"save": str(tmp_path / "run"), "save_interval": 1} | DISTRIBUTED
    losses = run_ranks(2, lambda: pretrain(make_run(train_iters=3, **place), forward_step).losses)[0]
    newest = iteration_folder(tmp_path / "run", 2)
    shutil.rmtree(iteration_folder(tmp_path / "run", 3))
    pointer = tmp_path / "run" / LATEST_POINTER
    pointer.write_text("2")
    verify_integrity_manifest(str(newest))  # Megatron-Core's own reader of the manifest
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    assert {file.suffix for file in files} >= {".distcp", ".json", ".yaml", ""}
    damaged = {}
    for file in (*files, pointer):
        for at in (0.1, 0.5, 0.9) if file.stat().st_size else ():
            case = tmp_path / f"case-{len(damaged)}"
            shutil.copytree(tmp_path / "run", case)
            damaged[case] = file.relative_to(tmp_path / "run")
            _flip(case / damaged[case], at)
            if file != pointer:
                with pytest.raises((CheckpointingException, ValueError)):
                    verify_integrity_manifest(str(case / "iter_0000002"))

    def resumed() -> list[Any]:
        return [newest_whole(case, every_bit=True) for case in damaged]

    def trained() -> dict[int, float]:
        case = next(case for case, file in damaged.items() if file.suffix == ".distcp")
        cfg = make_run(train_iters=3, load=str(case), **DISTRIBUTED)
        return dict(pretrain(cfg, forward_step).losses)

    for (case, file), found in zip(damaged.items(), run_ranks(2, resumed)[1], strict=True):
        if file.name == LATEST_POINTER:
            assert "points to" in str(found.pointer) or "which is neither" in str(found.pointer)
            assert found.folder.name == "iter_0000002"
        else:
            assert found.folder == case / "iter_0000001", file
            assert (
                file.name in found.notices()[0]
                or "integrity.json" in found.notices()[0]
                or file.name == "integrity.json"
            )
            assert "going on from" in found.notices()[0]
    assert run_ranks(2, trained)[0] == {step: losses[step] for step in (2, 3)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; a checkpoint of `tiny_model` with its optimizer takes 0.7 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_checkpoints_that_fitted(small_disk: Path, make_run: Callable[..., Any]) -> None:
    place = {"save": str(small_disk), "save_interval": 1, "save_retries": 0} | DISTRIBUTED

    class FillsDisk(Callback):
        """Leaves 200 kB after step 2: too little for another checkpoint."""

        def on_step_end(self, run: Any, result: Any) -> None:
            if run.progress.iteration == 2 and torch.distributed.get_rank() == 0:
                (small_disk / "filling").write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))

    with pytest.raises(
        RankFailed, match=r"iter_0000002 needs 0\.0007\d+ GB, and its file system has 0\.000\d+ GB free"
    ):
        run_ranks(2, lambda: pretrain(make_run(train_iters=3, **place), forward_step, [FillsDisk()]))
    assert saved_iterations(small_disk) == [1]
    (small_disk / "filling").unlink()

    def work() -> tuple[dict[int, float], dict[int, float]]:
        rest = pretrain(make_run(train_iters=3, load=str(small_disk), most_recent_k=1, **place), forward_step)
        return rest.losses, pretrain(make_run(train_iters=3, **DISTRIBUTED), forward_step).losses

    rest, alone = run_ranks(2, work)[0]
    assert rest == {step: alone[step] for step in (2, 3)}


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_a_file_that_cannot_be_written_to_its_end_is_no_checkpoint(
    in_background: bool, make_run: Callable[..., Any], tmp_path: Path
) -> None:
    """The operating system refuses rank 0's bytes in the middle of a file."""

    def work() -> None:
        class Limit(Callback):
            def on_step_end(self, run: Any, result: Any) -> None:
                if run.progress.iteration == 2 and torch.distributed.get_rank() == 0:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

        settings = {"save": str(tmp_path), "save_interval": 1, "save_retries": 0, "async_save": in_background}
        pretrain(make_run(train_iters=3, **settings), forward_step, [Limit()])

    with pytest.raises(RankFailed, match="File too large"):
        run_ranks(2, work)
    assert saved_iterations(tmp_path) == [1]
    assert sorted(entry.name for entry in tmp_path.glob("*iter_*")) == ["iter_0000001"]
    assert newest_whole(tmp_path).folder.name == "iter_0000001"


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_built(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BridgeError, match="file is not a folder; save into another"):
        make_run(save=str(tmp_path / "file" / "run")).validate(1)
    (tmp_path / "closed").mkdir(mode=0o555)
    tmp_path.chmod(0o755)

    def work() -> str:
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        with pytest.raises(BridgeError) as refusal:
            make_run(save=str(tmp_path / "closed" / "run")).validate(1)
        return str(refusal.value)

    assert "this user may not write into" in run_ranks(1, work)[0]
