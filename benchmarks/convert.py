"""Conversion beside plain safetensors: `uv run benchmarks/convert.py [--size 1b] [--repeat 3]`.

A random bf16 Llama is loaded into a Megatron model and saved again, in one CPU process. The alternative, in the same
run and on the same files, only moves bytes: `safetensors.torch.load_file` into tensors that exist (what any loading
into a model must do), and `safetensors.torch.save_file` with its bytes synced to disk. The order alternates; medians
are printed.

With `--offline` there is no model: the folder becomes a Megatron checkpoint and that a folder again, by one and two
workers; the alternative copies the folder's files by `load_file` and `save_file`, one by one, synced to disk too.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Hidden, layers, heads, groups, feed-forward, vocabulary; 1b is Llama 3.2 1B, small is there to try the script.
SIZES = {
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "7b": (4096, 32, 32, 32, 11008, 32000),  # Llama 2 7B
    "small": (512, 4, 8, 2, 2048, 8192),
}


def make_folder(folder: Path, size: str, shard_bytes: float = 5e9) -> None:
    """A random Llama of the size, written shard by shard."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron.bridge.conversion.hf import HFFolderWriter, write_config

    hidden, layers, heads, groups, ffn, vocab = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=ffn,
        vocab_size=vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    specs = {name: (tuple(tensor.shape), torch.bfloat16) for name, tensor in model.state_dict().items()}
    with HFFolderWriter(folder, specs, shard_bytes) as writer:
        for name, (shape, dtype) in specs.items():
            writer.write(name, torch.randn(shape).mul_(0.02).to(dtype))
        write_config(writer.partial, config.to_dict())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def plain(folder: Path, target: Path) -> tuple[float, float]:
    """(seconds to load, seconds to save) with safetensors alone."""
    import torch
    from safetensors.torch import load_file, save_file

    files = sorted(folder.glob("*.safetensors"))
    headers = [load_file(file) for file in files]
    # Zeroed, as the other side's model is: the first touch of fresh memory is no part of either's loading.
    held = [{name: torch.zeros_like(tensor) for name, tensor in header.items()} for header in headers]
    del headers

    def load() -> None:
        for file, tensors in zip(files, held, strict=True):
            for name, tensor in load_file(file).items():
                tensors[name].copy_(tensor)

    def save() -> None:
        target.mkdir()
        for file, tensors in zip(files, held, strict=True):
            save_file(tensors, target / file.name)
            with (target / file.name).open("rb") as written:
                os.fsync(written.fileno())

    loading, _ = timed(load)
    saving, _ = timed(save)
    shutil.rmtree(target)
    return loading, saving


def ours(folder: Path, target: Path) -> tuple[float, float]:
    """(seconds to load, seconds to save) through the bridge; building the empty model is not counted."""
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.perform_initialization = False
    provider.make_vocab_size_divisible_by = 64
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    for chunk in model:
        for weight in chunk.parameters():
            weight.data.zero_()
    loading, _ = timed(lambda: bridge.load_hf_weights(model))
    saving, _ = timed(lambda: bridge.save_hf_pretrained(model, target))
    shutil.rmtree(target)
    return loading, saving


def copy(folder: Path, target: Path) -> float:
    """Seconds to copy a folder's weights by safetensors alone, file by file."""
    from safetensors.torch import load_file, save_file

    def work() -> None:
        target.mkdir()
        for file in sorted(folder.glob("*.safetensors")):
            save_file(load_file(file), target / file.name)
            with (target / file.name).open("rb") as written:
                os.fsync(written.fileno())

    return timed(work)[0]


def offline(kind: str, folder: str, target: str) -> None:
    """One offline measurement in a process of its own (`copy`, `import-2`, `export-1`); prints JSON."""
    import torch

    # Imported on use, and not to be counted.
    import torch.distributed.checkpoint
    import transformers.models.llama.configuration_llama  # noqa: F401

    from megatron.bridge.conversion.offline import export_checkpoint, import_checkpoint

    torch.set_num_threads(1)
    name, _, workers = kind.partition("-")
    before = resource.getrusage(resource.RUSAGE_SELF)
    if name == "copy":
        seconds = copy(Path(folder), Path(target))
    else:
        convert = {"import": import_checkpoint, "export": export_checkpoint}[name]
        seconds, _ = timed(lambda: convert(folder, target, workers=int(workers)))
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": after.ru_maxrss, "imports": before.ru_maxrss}))


def measure_offline(size: str, repeat: int, scratch: Path) -> None:
    """Copy, import and export in turn; at most three copies of the weights lie on disk, two of a large model."""
    folder, megatron, out = scratch / "model", scratch / "megatron", scratch / "out"
    # In a child: a process begins with the peak memory of the one that starts it.
    run_child("make-1", folder, Path(size))
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    runs: dict[str, list[dict[str, float]]] = {}

    def measured(kind: str, source: Path) -> None:
        os.sync()
        runs.setdefault(kind, []).append(run_child(kind, source, out))
        if kind == "import-1" and not megatron.exists():
            out.rename(megatron)
        else:
            shutil.rmtree(out)

    for turn in range(repeat):
        for kind in ("copy", "import-1", "import-2"):
            measured(kind, folder)
        if size == "7b" and turn == repeat - 1:
            shutil.rmtree(folder)
        for kind in ("export-1", "export-2"):
            measured(kind, megatron)
    report_offline(nbytes, runs)


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Every figure's median, by kind of run."""
    return {
        kind: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for kind, results in runs.items()
    }


def report_offline(nbytes: int, runs: dict[str, list[dict[str, float]]]) -> None:
    median = medians(runs)
    print(f"model: {nbytes / 1e9:.2f} GB bf16; medians of {len(runs['copy'])} runs")
    print(f"{'':10}{'seconds':>9}{'GB/s':>7}{'of copy':>9}{'CPU s':>7}{'peak GB':>9}{'imports':>9}")
    for kind, figures in median.items():
        seconds, peak, imports = figures["seconds"], figures["peak"] * 1024 / 1e9, figures["imports"] * 1024 / 1e9
        speed, share = nbytes / 1e9 / seconds, median["copy"]["seconds"] / seconds
        print(f"{kind:10}{seconds:9.2f}{speed:7.2f}{share:9.0%}{figures['cpu']:7.2f}{peak:9.2f}{imports:9.2f}")


def run_child(kind: str, folder: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", kind, str(folder), str(target)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def child(kind: str, folder: str, target: str) -> None:
    """One measurement in a process of its own, so that peak memory is its own; prints JSON."""
    if kind.startswith("make-"):
        make_folder(Path(folder), target, float(kind.removeprefix("make-")) * 1e9)
        print("{}")
        return
    if kind not in ("plain", "ours"):
        offline(kind, folder, target)
        return
    from megatron.bridge.platform.engine import import_engine

    import_engine()
    import megatron.bridge.models.gpt_provider  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loading, saving = {"plain": plain, "ours": ours}[kind](Path(folder), Path(target))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"load": loading, "save": saving, "peak": peak, "imports": before}))


def measure(kind: str, folder: Path, scratch: Path) -> dict[str, float]:
    return run_child(kind, folder, scratch / f"out-{kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--offline", action="store_true", help="files to files, without a model")
    parser.add_argument("--child", nargs=3, metavar=("KIND", "FOLDER", "TARGET"))
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        if options.offline:
            measure_offline(options.size, options.repeat, Path(scratch))
            return
        folder = Path(scratch) / "model"
        # In a child: a process begins with the peak memory of the one that starts it.
        run_child("make-5", folder, Path(options.size))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        runs: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
        for _ in range(options.repeat):
            for kind, results in runs.items():
                results.append(measure(kind, folder, Path(scratch)))
    report(size, runs)


def report(size: int, runs: dict[str, list[dict[str, float]]]) -> None:
    median = medians(runs)
    print(f"model: {size / 1e9:.2f} GB bf16; medians of {len(runs['ours'])} runs, one CPU process each")
    print(f"{'':8}{'load s':>9}{'save s':>9}{'peak GB':>9}")
    for kind, figures in median.items():
        print(f"{kind:8}{figures['load']:9.2f}{figures['save']:9.2f}{figures['peak'] * 1024 / 1e9:9.2f}")
    ratios = {key: median["ours"][key] / median["plain"][key] for key in ("load", "save")}
    above = (median["ours"]["peak"] - median["ours"]["imports"]) * 1024 - size
    print(f"ours / plain: load {ratios['load']:.2f}x, save {ratios['save']:.2f}x")
    print(f"peak memory above imports and model: {above / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
