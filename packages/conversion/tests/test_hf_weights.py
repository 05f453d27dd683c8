"""Reading Hugging Face folders, against the safetensors library; every kind of damage is refused by name."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.bridge.conversion.hf import HFFolderError, HFWeights

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_dtype() -> dict[str, torch.Tensor]:
    numbers = torch.randn(6, 5)
    tensors = {
        str(dtype): numbers.to(dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
            torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        )
    }  # fmt: skip
    return tensors | {
        "bool": numbers > 0,
        "complex": torch.complex(numbers, numbers),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "scale": torch.ones(3, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards, written by the safetensors library: a and b in the first, c in the second."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2)}, folder / SHARDS[0], {"format": "pt"})
    save_file({"c": torch.zeros(5)}, folder / SHARDS[1], {"format": "pt"})
    write_index(folder, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def refusal(folder: Path) -> str:
    with pytest.raises(HFFolderError) as caught:
        HFWeights(folder)
    return str(caught.value)


def test_every_dtype_is_read_as_the_safetensors_library_wrote_it(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    weights = HFWeights(tmp_path)
    assert weights.keys() == tensors.keys()
    assert weights.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert weights[name] == (tuple(tensor.shape), tensor.dtype, tensor.nbytes, "model.safetensors")
        found = weights.read(name)
        assert (found.shape, found.dtype, bits(found)) == (tensor.shape, tensor.dtype, bits(tensor))


def test_shards_are_read_as_one(sharded: Path) -> None:
    weights = HFWeights(sharded)
    assert dict(weights) == {name: weights[name] for name in "abc"}
    assert weights.files == SHARDS
    expected = load_file(sharded / SHARDS[0]) | load_file(sharded / SHARDS[1])
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "slices",
    [
        (),
        (slice(1, 3),),
        (slice(None), slice(2, None)),
        (slice(0, 2), slice(1, 3)),
        (slice(2, 2), slice(None)),
        (slice(0, 7), slice(0, 8), slice(1, 2)),
    ],
)
def test_slices(tmp_path: Path, slices: tuple[slice, ...]) -> None:
    tensor = torch.randn(7, 8, 3)
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    assert torch.equal(HFWeights(tmp_path).read("t", slices), tensor[slices])


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("a", (slice(0, 4),)),
        ("a", (slice(-1, None),)),
        ("a", (slice(0, 3, 2),)),
        ("a", (slice(2, 1),)),
        ("b", (slice(0, 1), slice(0, 1))),
    ],
)
def test_slices_that_do_not_fit_are_refused(sharded: Path, name: str, slices: tuple[slice, ...]) -> None:
    with pytest.raises(HFFolderError, match=f"do not fit '{name}'"):
        HFWeights(sharded).read(name, slices)


def test_unknown_tensor_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(HFFolderError, match=r"no tensor 'lm_head.wieght'; did you mean 'lm_head.weight'"):
        HFWeights(tmp_path).read("lm_head.wieght")


def test_what_was_read_outlives_mapping_and_folder_and_is_not_shared(sharded: Path) -> None:
    weights = HFWeights(sharded, window_bytes=1)
    first, again = weights.read("a"), weights.read("a")
    first.zero_()
    assert torch.equal(again, torch.arange(12.0).view(3, 4))
    for name in "bcb":
        weights.read(name)
    shutil.rmtree(sharded)
    assert torch.equal(again, torch.arange(12.0).view(3, 4))
    with pytest.raises(HFFolderError, match="changed or removed"):
        weights.read("a")


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


def test_streaming_through_the_weights_keeps_few_of_them_in_memory(tmp_path: Path) -> None:
    size = 2**20
    save_file({f"t{i}": torch.full((size,), float(i)) for i in range(32)}, tmp_path / "model.safetensors")
    weights = HFWeights(tmp_path, window_bytes=2 * size * 4)
    before = resident_file_bytes()
    peak = 0
    for i in range(32):
        assert weights.read(f"t{i}").sum() == i * size
        peak = max(peak, resident_file_bytes() - before)
    assert peak < 6 * size * 4


def test_threads_and_forked_processes_read_the_same(sharded: Path) -> None:
    weights = HFWeights(sharded, window_bytes=16)
    expected = {name: bits(weights.read(name)) for name in weights}
    with ThreadPoolExecutor(4) as pool:
        names = list(weights) * 50
        assert list(pool.map(lambda name: bits(weights.read(name)), names)) == [expected[name] for name in names]
    child = os.fork()
    if child == 0:
        os._exit(0 if {name: bits(weights.read(name)) for name in weights} == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_missing_shards_are_all_named(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c": "gone-1.safetensors", "d": "gone-2.safetensors"})
    (sharded / SHARDS[1]).unlink()
    message = refusal(sharded)
    assert "gone-1.safetensors" in message
    assert "gone-2.safetensors" in message
    assert SHARDS[0] not in message


def test_index_that_omits_a_whole_shard_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[0]})
    assert SHARDS[1] in refusal(sharded)


def test_tensor_missing_from_the_index_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "c": SHARDS[1]})
    message = refusal(sharded)
    assert "lacks tensors" in message
    assert "'b'" in message


def test_tensor_missing_from_the_files_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], "d": SHARDS[1]})
    assert f"'d' in {SHARDS[1]}" in refusal(sharded)


def test_tensor_in_another_file_than_the_index_says_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    assert f"'b' in {SHARDS[1]} (it is in {SHARDS[0]})" in refusal(sharded)


def test_tensor_in_two_files_is_named(sharded: Path) -> None:
    save_file({"c": torch.zeros(5), "a": torch.zeros(1)}, sharded / SHARDS[1])
    message = refusal(sharded)
    assert "twice" in message
    assert "'a'" in message


def test_single_file_beside_an_index_is_refused(sharded: Path) -> None:
    save_file({"z": torch.zeros(1)}, sharded / "model.safetensors")
    assert "model.safetensors" in refusal(sharded)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"metadata": {}}', "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "'a'"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "'a'"),
        ('{"weight_map": {"a": "/a.safetensors"}}', "'a'"),
    ],
)
def test_damaged_index(sharded: Path, text: str, culprit: str) -> None:
    (sharded / INDEX).write_text(text)
    for shard in SHARDS:
        (sharded / shard).unlink()
    message = refusal(sharded)
    assert INDEX in message
    assert culprit in message


def test_folders_without_safetensors_are_refused_with_what_is_there(tmp_path: Path) -> None:
    assert "not a folder" in refusal(tmp_path / "nowhere")
    assert "no weights" in refusal(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert "consolidated.safetensors" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "save_pretrained" in refusal(tmp_path)


def replace_header(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Rewrite a file with a changed header text, its length adapted."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = change(content[8 : 8 + length])
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


@pytest.mark.parametrize("keep", [0, 3, 8, 50, -1])
def test_truncated_file_is_named(sharded: Path, keep: int) -> None:
    file = sharded / SHARDS[1]
    file.write_bytes(file.read_bytes()[:keep])
    assert SHARDS[1] in refusal(sharded)


def test_all_damaged_files_are_named(sharded: Path) -> None:
    for shard in SHARDS:
        (sharded / shard).write_bytes((sharded / shard).read_bytes() + b"more")
    message = refusal(sharded)
    assert all(shard in message for shard in SHARDS)
    assert "no tensor owns" in message


def test_every_bit_flip_of_the_length_or_header_is_refused_or_renames_a_tensor(sharded: Path) -> None:
    file = sharded / SHARDS[1]
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    harmless = 0
    for position in range(8 + length):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            file.write_bytes(flipped)
            try:
                HFWeights(sharded)
            except HFFolderError as error:
                assert file.name in str(error)  # noqa: PT017
            else:
                # The library, which checks the same file on its own, must agree that nothing of the tensor changed.
                assert torch.equal(load_file(file)["c"].view(torch.uint8), torch.zeros(20, dtype=torch.uint8))
                harmless += 1
    assert harmless < length


@pytest.mark.parametrize(
    ("old", "new", "culprit"),
    [
        (b'"F32"', b'"F99"', "'F99'"),
        (b'"shape":[5]', b'"shape":[6]', "'c'"),
        (b'"shape":[5]', b'"shape":[-5]', "'c'"),
        (b'"shape":[5]', b'"shape":[5.0]', "'c'"),
        (b'"shape":[5]', b'"shape":null', "'c'"),
        (b"[0,20]", b"[4,24]", "'c'"),
        (b"[0,20]", b"[20,0]", "'c'"),
        (b"[0,20]", b"[0]", "'c'"),
        (b'"c":', b'"c":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"c":', "'c' twice"),
        (b"{", b"[{", "JSON"),
    ],
)
def test_wrong_header(sharded: Path, old: bytes, new: bytes, culprit: str) -> None:
    replace_header(sharded / SHARDS[1], lambda header: header.replace(old, new, 1))
    message = refusal(sharded)
    assert SHARDS[1] in message
    assert culprit in message


def test_overlapping_tensors_are_refused(sharded: Path) -> None:
    entry = '"{}":{{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}'
    replace_header(sharded / SHARDS[1], lambda _: ("{" + entry.format("c") + "," + entry.format("d") + "}").encode())
    assert "'d' begins at byte 0" in refusal(sharded)
