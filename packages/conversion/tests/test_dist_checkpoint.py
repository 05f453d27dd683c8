"""Distributed checkpoints: whole or absent, and refused when they do not match."""

import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import load as core_load
from megatron.core.dist_checkpointing.serialization import save as core_save

from megatron.bridge.cli.root import run
from megatron.bridge.conversion import checkpoint_save, dist_checkpoint
from megatron.bridge.conversion.checkpoint_layout import LATEST_POINTER, CheckpointError
from megatron.bridge.conversion.integrity import recorded_digests, wrong_files
from megatron.bridge.testing import run_ranks


def _state(rows: int = 4, seed: int = 0, **extra: Any) -> dict[str, Any]:
    """Two tensors, `a` split by rows over the ranks and `b` replicated, an object and a common value."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rows, 3, generator=generator), torch.randn(5, generator=generator).bfloat16()
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = a.chunk(world)[rank]
    return {
        "a": ShardedTensor.from_rank_offsets("weights.a", mine.clone(), (0, rank, world)),
        "b": ShardedTensor.from_rank_offsets("weights.b", b, replica_id=rank),
        "object": ShardedObject("state.object", {"text": "kept"}, (1,), (0,), replica_id=rank),
        "iteration": 7,
        **extra,
    }


def _values(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: getattr(state[name], "data", state[name]) for name in ("a", "b")}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    left, right = _values(one), _values(other)
    return all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


def _failure(work: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        work()
    return str(caught.value)


def _single(function: Any, *args: Any) -> Any:
    return run_ranks(1, function, *args, timeout=60)[0]


def test_what_is_saved_is_loaded_and_core_reads_it_too(tmp_path: Path) -> None:
    def work() -> tuple[bool, bool, Any, Any]:
        folder = dist_checkpoint.save(tmp_path, 7, _state(), side_files={"run.yaml": "a: 1", "raw": b"\0"})
        ours = dist_checkpoint.load(tmp_path, _state(seed=1))
        theirs = core_load(_state(seed=2), str(folder))
        return _same(ours, _state()), _same(theirs, _state()), ours["object"], ours["iteration"]

    assert _single(work) == (True, True, {"text": "kept"}, 7)
    folder = tmp_path / "iter_0000007"
    assert dist_checkpoint.resolve(tmp_path) == folder == dist_checkpoint.resolve(folder)
    assert (tmp_path / LATEST_POINTER).read_text() == "7"
    assert (folder / "run.yaml").read_text() == "a: 1"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["iter_0000007", LATEST_POINTER]
    index = dist_checkpoint.tensor_index(tmp_path)
    assert {key: (entry.shape, entry.dtype) for key, entry in index.items()} == {
        "weights.a": ((4, 3), torch.float32),
        "weights.b": ((5,), torch.bfloat16),
    }
    assert dist_checkpoint.load_common(tmp_path)["iteration"] == 7


def test_a_checkpoint_of_core_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil", reason="Megatron-Core's own writer needs psutil")
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", queue.Queue())
    (tmp_path / "iter_0000001").mkdir()

    def work() -> bool:
        core_save(_state(), str(tmp_path / "iter_0000001"))
        return _same(dist_checkpoint.load(tmp_path / "iter_0000001", _state(seed=3)), _state())

    assert _single(work)


def test_ranks_may_differ_between_saving_and_loading(tmp_path: Path) -> None:
    run_ranks(2, lambda: dist_checkpoint.save(tmp_path, 3, _state()) and None, timeout=60)
    assert _single(lambda: _same(dist_checkpoint.load(tmp_path, _state(seed=1)), _state()))
    assert (
        run_ranks(4, lambda: _same(dist_checkpoint.load(tmp_path, _state(seed=1)), _state()), timeout=60) == [True] * 4
    )


def test_keys_and_shapes_must_fit(tmp_path: Path) -> None:
    def work() -> list[str]:
        extra = ShardedTensor.from_rank_offsets("weights.c", torch.ones(2))
        extra_state = ShardedObject("layer._extra_state", None, (1,), (0,))
        dist_checkpoint.save(tmp_path, 1, _state(optional=extra))
        less = _state(seed=1, spec_dependent=extra_state)  # absent from the checkpoint, and that is fine
        messages = [
            _failure(lambda: dist_checkpoint.load(tmp_path, less)),
            _failure(lambda: dist_checkpoint.load(tmp_path, _state(rows=8, optional=extra))),
            _failure(
                lambda: dist_checkpoint.load(
                    tmp_path,
                    _state(optional=extra, more=ShardedTensor.from_rank_offsets("weights.d", torch.ones(2))),
                )
            ),
        ]
        assert _same(dist_checkpoint.load(tmp_path, less, strict=False), _state())
        assert _same(dist_checkpoint.load(tmp_path, less, ignore=("weights.c",)), _state())
        return messages

    unexpected, shape, missing = _single(work)
    assert "the checkpoint has what the model lacks: weights.c" in unexpected
    assert "weights.a is [4, 3] in the checkpoint, [8, 3] in the model" in shape
    assert "the model has what the checkpoint lacks: weights.d" in missing


def test_damage_is_named(tmp_path: Path) -> None:
    _single(lambda: dist_checkpoint.save(tmp_path, 1, _state()) and None)
    folder = tmp_path / "iter_0000001"
    shard = next(folder.glob("*.distcp"))
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-10])
    message = _single(lambda: _failure(lambda: dist_checkpoint.load(tmp_path, _state())))
    assert shard.name in message
    assert "cut off" in message
    assert "cut off" in _failure(lambda: dist_checkpoint.tensor_index(tmp_path))

    shard.unlink()
    assert f"{shard.name} is missing" in _failure(lambda: dist_checkpoint.tensor_index(tmp_path))

    shard.write_bytes(bytes(len(whole)))
    assert "cannot be read" in _single(lambda: _failure(lambda: dist_checkpoint.load(tmp_path, _state())))

    shard.write_bytes(whole)
    (folder / ".metadata").write_bytes(b"not a pickle")
    assert ".metadata cannot be read" in _failure(lambda: dist_checkpoint.tensor_index(tmp_path))
    (folder / ".metadata").unlink()
    assert "'.metadata' is missing" in _failure(lambda: dist_checkpoint.resolve(folder))
    assert "points to '1'" in _failure(lambda: dist_checkpoint.resolve(tmp_path))


def test_a_changed_file_is_found_by_its_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _single(lambda: dist_checkpoint.save(tmp_path, 1, _state(), side_files={"run.yaml": "a: 1"}) and None)
    assert run(["inspect", str(tmp_path), "--digests"]) == 0
    assert "4 files are as they were written" in capsys.readouterr().out
    (tmp_path / "iter_0000001" / "run.yaml").write_text("a: 2")
    assert run(["inspect", str(tmp_path), "--digests"]) == 1
    assert "run.yaml has changed since it was written" in capsys.readouterr().err
    (tmp_path / "iter_0000001" / "integrity.json").unlink()
    assert run(["inspect", str(tmp_path), "--digests"]) == 1
    assert "records no digests" in capsys.readouterr().err


def test_a_path_that_is_no_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "did you mean 'run'" in _failure(lambda: dist_checkpoint.resolve(tmp_path / "runs"))
    assert "is empty" in _failure(lambda: dist_checkpoint.resolve(tmp_path / "run"))
    (tmp_path / "run" / "config.json").touch()
    assert "Hugging Face folder" in _failure(lambda: dist_checkpoint.resolve(tmp_path / "run"))
    (tmp_path / "run" / LATEST_POINTER).write_text("ten")
    assert "'ten'" in _failure(lambda: dist_checkpoint.latest_iteration(tmp_path / "run"))
    assert "mp_rank" in _failure(lambda: dist_checkpoint.resolve(_legacy(tmp_path / "old")))


def _legacy(folder: Path) -> Path:
    (folder / "mp_rank_00").mkdir(parents=True)
    return folder


def test_a_failed_save_leaves_the_old_checkpoint_and_pointer(tmp_path: Path) -> None:
    def work() -> list[str]:
        rank = dist.get_rank()
        dist_checkpoint.save(tmp_path, 1, _state())
        # Both ranks claim the first half of the tensor: the second half would be lost.
        overlapping = _state(extra=ShardedTensor.from_rank_offsets("half", torch.ones(1), (0, 0, 2), replica_id=0))
        # Only rank 1 fails, and only while writing.
        unwritable = _state(extra=ShardedObject("bomb", _Unpicklable(), (2,), (rank,)))
        return [
            _failure(lambda: dist_checkpoint.save(tmp_path, 1, _state())),
            _failure(lambda: dist_checkpoint.save(tmp_path, 2, overlapping)),
            _failure(lambda: dist_checkpoint.save(tmp_path, 2, unwritable)),
            _failure(lambda: dist_checkpoint.save(tmp_path, 2, _state(), side_files={"../out": "x"})),
        ]

    for exists, overlapping, unwritable, outside in run_ranks(2, work, timeout=60):
        assert "iter_0000001 exists" in exists
        assert "half" in overlapping
        assert "the pickle of rank 1" in unwritable
        assert "'../out'" in outside
    assert (tmp_path / LATEST_POINTER).read_text() == "1"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["iter_0000001", LATEST_POINTER]


class _Unpicklable:
    """Fails to be written on rank 1."""

    def __reduce__(self) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("the pickle of rank 1")
        return (str, ("fine",))


def test_prepared_files_are_moved_in_at_the_end_or_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, written = tmp_path / ".prepared", checkpoint_save.write_manifest
    (prepared / "hf").mkdir(parents=True)
    for name in ("one", "two", "three"):
        (prepared / "hf" / name).write_text(name)

    def once(folder: Path, digests: Any) -> None:
        monkeypatch.setattr(checkpoint_save, "write_manifest", written)
        raise OSError("no space left for the manifest")

    def work() -> tuple[str, list[str]]:
        monkeypatch.setattr(checkpoint_save, "write_manifest", once)
        saving = dist_checkpoint.start_save(tmp_path, 3, _state(), prepared=prepared)
        saving.write()
        failure = _failure(saving.finish)
        left = sorted(each.name for each in (prepared / "hf").iterdir())
        dist.barrier()
        saving.write()
        saving.finish()
        return failure, left

    for failure, left in run_ranks(2, work, timeout=60):
        assert "no space left for the manifest" in failure
        assert left == ["one", "three", "two"]
    folder = tmp_path / "iter_0000003"
    assert (folder / "hf/two").read_text() == "two"
    assert {"hf/one", "hf/two", "hf/three"} <= recorded_digests(folder).keys()
    assert not wrong_files(folder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["iter_0000003", LATEST_POINTER]


def test_leftovers_of_a_killed_save_are_replaced(tmp_path: Path) -> None:
    leftover = tmp_path / ".iter_0000002.partial"
    leftover.mkdir()
    (leftover / "junk").touch()
    folder = _single(lambda: dist_checkpoint.save(tmp_path, 2, _state()))
    assert not leftover.exists()
    assert not (folder / "junk").exists()
    _single(lambda: dist_checkpoint.save(tmp_path, 2, _state(seed=9), overwrite=True) and None)
    assert _single(lambda: _same(dist_checkpoint.load(tmp_path, _state()), _state(seed=9)))


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refusal = _single(lambda: _failure(lambda: dist_checkpoint.save(tmp_path / "file", 1, _state())))
    assert "save into another folder" in refusal


def test_a_script_without_a_main_guard_can_save(tmp_path: Path) -> None:
    """Megatron-Core's writer spawns a process that runs the script again; ours starts none."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from megatron.bridge.platform import initialize_distributed\n"
        "initialize_distributed()\n"
        "from megatron.bridge.conversion import dist_checkpoint\n"
        "from megatron.core.dist_checkpointing.mapping import ShardedTensor\n"
        "print('started')\n"
        f"dist_checkpoint.save({str(tmp_path / 'out')!r}, 1, "
        "{'a': ShardedTensor.from_rank_offsets('a', torch.ones(2))})\n"
    )
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started") == 1
    assert dist_checkpoint.latest_iteration(tmp_path / "out") == 1
