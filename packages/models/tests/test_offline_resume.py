"""Conversions that are killed go on where they stopped, give the identical result, and never look finished before."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig

from megatron.bridge.conversion.checkpoint_layout import CheckpointError, resolve
from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import save_random_model

KILLS = 20
CONFIG = LlamaConfig(
    vocab_size=257,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(Hugging Face folder, checkpoint)"""
    root = tmp_path_factory.mktemp("resume")
    save_random_model(CONFIG, root / "hf")
    import_checkpoint(root / "hf", root / "megatron")
    return root / "hf", root / "megatron"


def to_megatron(source, target, progress=None, **options):
    return import_checkpoint(source[0], target / "out", workers=2, file_bytes=60_000, progress=progress, **options)


def to_hf(source, target, progress=None, **options):
    return export_checkpoint(source[1], target / "out", workers=2, max_shard_bytes=90_000, progress=progress, **options)


DIRECTIONS = {"import": to_megatron, "export": to_hf}


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def looks_finished(target, direction):
    """What a user or a loader would take for a result."""
    if direction == "export":
        return (target / "out").exists()
    try:
        resolve(target / "out")
    except CheckpointError:
        return any((target / "out").glob("iter_*"))
    return True


def killed(work, files, pause):
    """Run `work(progress)` in a child that is killed `pause` seconds after so many files; True: it had finished before.

    By files and not by the clock alone: a busy machine may take ten times as long as the run before.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda file, nbytes: os.write(writing, b"."))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as done:
        for _ in range(files):
            if not done.read(1):
                break
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        return not os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killed_at_random_moments_and_resumed(source, tmp_path, direction):
    convert = DIRECTIONS[direction]
    written = []
    started = time.perf_counter()
    convert(source, tmp_path / "reference", lambda file, nbytes: written.append(file))
    duration = time.perf_counter() - started
    reference, total = tree(tmp_path / "reference"), len(written)
    assert total > 10
    # Stratified, so that the beginning, the files and the end are all met.
    chance = random.Random(direction)
    taken_over = 0
    for number in range(KILLS):
        target = tmp_path / str(number)
        files, pause = total * number // (KILLS - 1), chance.random() * duration / KILLS
        finished = killed(lambda progress, target=target: convert(source, target, progress), files, pause)
        if looks_finished(target, direction):
            present = tree(target)
            assert all(present[path] == content for path, content in reference.items() if path in present)
            assert {p for p in reference if not p.name.startswith("latest")} <= present.keys()
        assert looks_finished(target, direction) or not finished
        again = []
        convert(source, target, lambda file, nbytes, again=again: again.append(file), overwrite=True)
        taken_over += bool(again) and len(again) < total
        assert tree(target) == reference, f"killed {pause:.3f} s after {files} files"
    assert taken_over > 3, "resuming took nothing over"


def test_a_kill_before_the_pointer_is_written_is_made_good(source, tmp_path, monkeypatch):
    from megatron.bridge.conversion import checkpoint_files

    to_megatron(source, tmp_path / "reference")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_files, "write_latest_pointer", lambda root, iteration: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            to_megatron(source, tmp_path / "target")
    with pytest.raises(CheckpointError):
        resolve(tmp_path / "target" / "out")
    again = []
    to_megatron(source, tmp_path / "target", lambda file, nbytes: again.append(file))
    assert not again
    assert tree(tmp_path / "target") == tree(tmp_path / "reference")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_there_is_not_overwritten(source, tmp_path, direction):
    convert = DIRECTIONS[direction]
    convert(source, tmp_path)
    with pytest.raises(BridgeError, match="exists"):
        convert(source, tmp_path)
    convert(source, tmp_path, overwrite=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_several_kills_of_one_conversion(source, tmp_path, direction):
    convert = DIRECTIONS[direction]
    convert(source, tmp_path / "reference")
    for number in range(6):
        if not looks_finished(tmp_path / "killed", direction):
            killed(lambda progress: convert(source, tmp_path / "killed", progress), number, 0.005)
    convert(source, tmp_path / "killed", overwrite=True)
    assert tree(tmp_path / "killed") == tree(tmp_path / "reference")


def stopped(convert, source, target, after=5):
    """Stop a conversion, as an error would, once `after` files are finished; returns its hidden folder."""
    count = 0

    def progress(file, nbytes):
        nonlocal count
        count += 1
        if count == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, progress)
    return next(path for path in target.rglob(".*.offline") if path.is_dir())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_finished_file_is_trusted_only_if_it_is_intact(source, tmp_path, direction):
    convert = DIRECTIONS[direction]
    convert(source, tmp_path / "reference")
    partial = stopped(convert, source, tmp_path / "stopped")
    finished = sorted(path for path in partial.iterdir() if path.suffix in (".distcp", ".safetensors"))
    assert len(finished) >= 3
    flipped, cut, *kept = finished
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    again = []
    convert(source, tmp_path / "stopped", lambda file, nbytes: again.append(file))
    assert {flipped.name, cut.name} <= set(again)
    assert not {path.name for path in kept} & set(again)
    assert tree(tmp_path / "stopped") == tree(tmp_path / "reference")


def test_a_changed_source_is_not_continued(source, tmp_path):
    save_random_model(CONFIG, tmp_path / "hf", seed=1)
    stopped(to_megatron, (tmp_path / "hf",), tmp_path / "target")
    save_random_model(CONFIG, tmp_path / "hf", seed=2)
    to_megatron((tmp_path / "hf",), tmp_path / "target")
    to_megatron((tmp_path / "hf",), tmp_path / "reference")
    assert tree(tmp_path / "target") == tree(tmp_path / "reference")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_processes_do_not_convert_to_one_place(source, tmp_path, direction):
    convert = DIRECTIONS[direction]

    def progress(file, nbytes):
        with pytest.raises(BridgeError, match="another process"):
            convert(source, tmp_path)

    convert(source, tmp_path, progress)
    assert Path(tmp_path / "out").is_dir()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_full_disk_keeps_what_is_finished(source, tmp_path, monkeypatch, direction):
    import shutil

    convert = DIRECTIONS[direction]
    partial = stopped(convert, source, tmp_path)
    finished = [*partial.glob("*.distcp"), *partial.glob("*.safetensors")]
    finished.pop().unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(BridgeError, match="make room"):
        convert(source, tmp_path)
    assert finished
    assert all(path.is_file() for path in finished)
