"""Writing Hugging Face folders: readable by the safetensors library, whole or not there, by one process or several."""

import errno
import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from time import sleep

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron.bridge.conversion.hf import HFFolderError, HFFolderWriter, HFWeights, write_config
from megatron.bridge.conversion.hf.shard_files import ShardFile

type Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(6, 4, generator=generator)
    return {
        "fp32": numbers,
        "bool": numbers > 0,
        "bf16": numbers.bfloat16(),
        "fp16": numbers.half(),
        "fp8": numbers.to(torch.float8_e4m3fn),
        "int64": numbers.long(),
        "scalar": torch.tensor(3, dtype=torch.int8),
        "empty": torch.empty(4, 0, dtype=torch.bfloat16),
        "transposed": numbers.t(),
        "parameter": torch.nn.Parameter(numbers[:3]),
    }


def spec_of(values: dict[str, torch.Tensor]) -> Spec:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in values.items()}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("max_shard_bytes", [5e9, 200, 1])
def test_the_safetensors_library_reads_what_was_written(tmp_path: Path, max_shard_bytes: float) -> None:
    values = tensors()
    with HFFolderWriter(tmp_path / "out", spec_of(values), max_shard_bytes) as writer:
        for name in reversed(values):
            writer.write(name, values[name])
        assert writer.finish() == tmp_path / "out"
    assert left_in(tmp_path) == ["out"]
    found: dict[str, torch.Tensor] = {}
    for file in writer.files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        shard = load_file(tmp_path / "out" / file)
        assert shard.keys().isdisjoint(found)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= max_shard_bytes
        found |= shard
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        assert (found[name].shape, found[name].dtype, bits(found[name])) == (
            tensor.shape, tensor.dtype, bits(tensor.detach())
        )  # fmt: skip


def test_index_names_every_tensor_and_the_total(tmp_path: Path) -> None:
    values = tensors()
    with HFFolderWriter(tmp_path / "out", spec_of(values), 200) as writer:
        for name, tensor in values.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in values.values())
    assert index["weight_map"] == {name: file for file in writer.files for name in load_file(tmp_path / "out" / file)}


def test_single_shard_has_no_index(tmp_path: Path) -> None:
    with HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)}) as writer:
        writer.write("a", torch.ones(2))
    assert left_in(tmp_path / "out") == ["model.safetensors"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)}) as writer:
            writer.write("a", torch.ones(2))
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("name", "tensor", "culprit"),
    [
        ("qeight", torch.ones(2, 3), "not announced a tensor 'qeight'; did you mean 'weight'"),
        ("weight", torch.ones(3, 2), r"'weight' was announced .* \[2, 3\], what came is .* \[3, 2\]"),
        ("weight", torch.ones(2, 3).half(), "what came is torch.float16"),
    ],
)
def test_wrong_tensor_is_refused(tmp_path: Path, name: str, tensor: torch.Tensor, culprit: str) -> None:
    with (
        pytest.raises(HFFolderError, match=culprit),
        HFFolderWriter(tmp_path / "out", {"weight": ((2, 3), torch.float32)}) as writer,
    ):
        writer.write(name, tensor)
    assert left_in(tmp_path) == []


def test_second_write_is_refused(tmp_path: Path) -> None:
    with HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)}) as writer:
        writer.write("a", torch.ones(2))
        with pytest.raises(HFFolderError, match="'a' was already written"):
            writer.write("a", torch.zeros(2))
    assert HFWeights(tmp_path / "out").read("a").tolist() == [1.0, 1.0]


def test_missing_tensors_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    spec: Spec = dict.fromkeys("abc", ((2,), torch.float32))
    with (
        pytest.raises(HFFolderError, match=r"2 of 3 tensors never came:\n  a\n  c"),
        HFFolderWriter(tmp_path / "out", spec) as writer,
    ):
        writer.write("b", torch.ones(2))
    assert left_in(tmp_path) == []


def test_nothing_is_written_after_the_end(tmp_path: Path) -> None:
    with HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)}) as writer:
        writer.write("a", torch.ones(2))
        writer.finish()
    with pytest.raises(HFFolderError, match="already finished"):
        writer.finish()
    with pytest.raises(HFFolderError, match="too late"):
        writer.write("a", torch.ones(2))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_crash_in_the_middle_leaves_no_trace(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "new" / "parents" / "out"
    spec: Spec = dict.fromkeys("ab", ((1000,), torch.float32))

    def crash() -> None:
        with HFFolderWriter(target, spec, 100) as writer:
            writer.write("a", torch.ones(1000))
            write_config(writer.partial, {})
            raise error

    with pytest.raises(error):
        crash()
    assert left_in(tmp_path) == []


def die_in_the_middle(target: Path) -> None:
    writer = HFFolderWriter(target, {"a": ((10,), torch.float32), "b": ((10,), torch.float32)})
    writer.write("a", torch.ones(10))
    write_config(writer.partial, {"architectures": ["LlamaForCausalLM"]})
    os._exit(9)


def test_what_a_killed_process_leaves_is_no_folder_to_load(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=die_in_the_middle, args=(tmp_path / "out",))
    process.start()
    process.join()
    assert process.exitcode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    with pytest.raises(HFFolderError, match="no weights"):
        HFWeights(left)
    with HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)}) as writer:
        writer.write("a", torch.ones(2))
    assert (tmp_path / "out").is_dir()


def test_full_disk_is_told_and_the_tensor_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(HFFolderError, match=r"'a' cannot be written .* No space left"):
            writer.write("a", torch.ones(2))
    with pytest.raises(HFFolderError, match="never came"):
        writer.finish()
    assert left_in(tmp_path) == []


def test_failure_of_the_background_sync_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ShardFile) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ShardFile, "sync_and_close", broken)
    with (
        pytest.raises(HFFolderError, match="Input/output error"),
        HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)}) as writer,
    ):
        writer.write("a", torch.ones(2))
    assert left_in(tmp_path) == []


def test_too_little_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(HFFolderError, match=r"needs 1000000\d*\.\d+ GB"):
        HFFolderWriter(tmp_path / "out", {"a": ((10**15,), torch.int8)})
    assert left_in(tmp_path) == []


def test_existing_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(HFFolderError, match=r"out exists; .* overwrite=True"):
        HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)})
    assert left_in(tmp_path) == ["out"]


def test_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    writer = HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)})
    writer.write("a", torch.ones(2))
    (tmp_path / "out").mkdir()
    with pytest.raises(HFFolderError, match="out exists"):
        writer.finish()
    assert left_in(tmp_path) == ["out"]
    assert left_in(tmp_path / "out") == []


def write_one(target: Path, value: float, *, overwrite: bool = False) -> None:
    with HFFolderWriter(target, {"a": ((2,), torch.float32)}, overwrite=overwrite) as writer:
        writer.write("a", torch.full((2,), value))
        write_config(writer.partial, {})


def test_overwriting_replaces_the_folder_at_the_end(tmp_path: Path) -> None:
    write_one(tmp_path / "out", 1.0)
    (tmp_path / "out" / "stale.json").touch()
    with HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)}, overwrite=True) as writer:
        writer.write("a", torch.full((2,), 2.0))
        assert HFWeights(tmp_path / "out").read("a").tolist() == [1.0, 1.0]
    assert HFWeights(tmp_path / "out").read("a").tolist() == [2.0, 2.0]
    assert left_in(tmp_path) == ["out"]
    assert left_in(tmp_path / "out") == ["model.safetensors"]


def test_failed_overwriting_keeps_the_old_folder(tmp_path: Path) -> None:
    write_one(tmp_path / "out", 1.0)
    with pytest.raises(HFFolderError, match="never came"):
        HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)}, overwrite=True).finish()
    assert HFWeights(tmp_path / "out").read("a").tolist() == [1.0, 1.0]
    assert left_in(tmp_path) == ["out"]


def test_old_folder_is_put_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_one(tmp_path / "out", 1.0)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".out.partial-" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(HFFolderError, match="cannot be put in place: Input/output error"):
        write_one(tmp_path / "out", 2.0, overwrite=True)
    assert HFWeights(tmp_path / "out").read("a").tolist() == [1.0, 1.0]
    assert left_in(tmp_path) == ["out"]


def test_overwriting_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    write_one(tmp_path / "real", 1.0)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_one(tmp_path / "link", 2.0, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert HFWeights(tmp_path / "real").read("a").tolist() == [2.0, 2.0]


def test_what_is_not_a_model_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").touch()
    with pytest.raises(HFFolderError, match="not a Hugging Face folder"):
        HFFolderWriter(tmp_path / "home", {"a": ((2,), torch.float32)}, overwrite=True)
    with pytest.raises(HFFolderError, match="not a Hugging Face folder"):
        HFFolderWriter(tmp_path / "home" / "letters.txt", {"a": ((2,), torch.float32)}, overwrite=True)
    assert left_in(tmp_path / "home") == ["letters.txt"]


def test_parent_that_cannot_hold_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HFFolderError, match=r"file/out cannot be written"):
        HFFolderWriter(tmp_path / "file" / "out", {"a": ((2,), torch.float32)})
    # A file system that no user may write to, root included.
    with pytest.raises(HFFolderError, match=r"/proc/.*cannot be written"):
        HFFolderWriter("/proc/out", {"a": ((2,), torch.float32)})


@pytest.mark.parametrize(
    ("spec", "max_shard_bytes", "culprit"),
    [
        ({}, 5e9, "no tensors"),
        ({"a": ((2,), torch.float32)}, 0, "max_shard_bytes"),
        ({"a": ((2,), torch.float32)}, float("nan"), "max_shard_bytes"),
        ({"a": ((2,), torch.complex128)}, 5e9, "'a': torch.complex128"),
        ({"__metadata__": ((2,), torch.float32)}, 5e9, "reserved"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(tmp_path: Path, spec: Spec, max_shard_bytes: float, culprit: str) -> None:
    with pytest.raises(HFFolderError, match=culprit):
        HFFolderWriter(tmp_path / "out", spec, max_shard_bytes)
    assert left_in(tmp_path) == []


def test_threads_write_at_the_same_time(tmp_path: Path) -> None:
    values = {f"t{i}": torch.full((1000 + i,), float(i)) for i in range(64)}
    with HFFolderWriter(tmp_path / "out", spec_of(values), 50_000) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: writer.write(name, values[name]), values))
    weights = HFWeights(tmp_path / "out")
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in values.items())


def test_finishing_waits_for_threads_that_still_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, write = Event(), ShardFile.write

    def slowly(self: ShardFile, name: str, tensor: torch.Tensor) -> None:
        started.set()
        sleep(0.2)
        write(self, name, tensor)

    monkeypatch.setattr(ShardFile, "write", slowly)
    writer = HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)})
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(writer.write, "a", torch.ones(2))
        started.wait()
        writer.finish()
        written.result()
    assert HFWeights(tmp_path / "out").read("a").tolist() == [1.0, 1.0]


def write_files_of(rank: int, world: int, target: Path, partial: Path, values: dict[str, torch.Tensor]) -> None:
    with HFFolderWriter(target, spec_of(values), 200, partial=partial) as writer:
        for file in writer.files_of(rank, world):
            for name in writer.tensors_of(file):
                writer.write(name, values[name])


def run(*arguments: tuple[object, ...]) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_files_of, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_three_processes_fill_one_folder(tmp_path: Path) -> None:
    values = {f"t{i}": torch.full((20 + i,), float(i)) for i in range(10)}
    with HFFolderWriter(tmp_path / "out", spec_of(values), 200) as writer:
        assert len(writer.files) > 3
        assert sorted(sum((writer.files_of(rank, 3) for rank in range(3)), ())) == list(writer.files)
        for file in writer.files_of(0, 3):
            for name in writer.tensors_of(file):
                writer.write(name, values[name])
        run(*((rank, 3, tmp_path / "out", writer.partial, values) for rank in (1, 2)))
    weights = HFWeights(tmp_path / "out")
    assert weights.keys() == values.keys()
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in values.items())
    assert left_in(tmp_path / "out") == sorted((*writer.files, "model.safetensors.index.json"))


def test_process_that_did_not_write_its_part_is_noticed(tmp_path: Path) -> None:
    values = {f"t{i}": torch.full((20,), float(i)) for i in range(6)}
    with (
        pytest.raises(HFFolderError, match=r"2 of 6 tensors never came:\n  t2\n  t3"),
        HFFolderWriter(tmp_path / "out", spec_of(values), 200) as writer,
    ):
        run((0, 2, tmp_path / "out", writer.partial, values))
    assert left_in(tmp_path) == []


def test_two_processes_writing_the_same_are_noticed(tmp_path: Path) -> None:
    values = {f"t{i}": torch.full((20,), float(i)) for i in range(6)}
    with (
        pytest.raises(HFFolderError, match=r"two processes wrote the same tensors.*\n  t0\n"),
        HFFolderWriter(tmp_path / "out", spec_of(values), 200) as writer,
    ):
        run(*((0, 1, tmp_path / "out", writer.partial, values) for _ in range(2)))


def test_process_with_another_layout_is_refused(tmp_path: Path) -> None:
    writer = HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)})
    with pytest.raises(HFFolderError, match="laid out for other tensors"):
        HFFolderWriter(tmp_path / "out", {"b": ((2,), torch.float32)}, partial=writer.partial)
    joined = HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)}, partial=writer.partial)
    with pytest.raises(HFFolderError, match="opened by another process"):
        joined.finish()
    joined.abort()
    assert writer.partial.exists()
    writer.abort()
    with pytest.raises(HFFolderError, match="cannot be read"):
        HFFolderWriter(tmp_path / "out", {"a": ((2,), torch.float32)}, partial=writer.partial)
