"""Images and texts from energon's shards and from datasets on disk train a MIMO model at any placement."""

import gc
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge.data.tokenizers.null import NullTokenizer
from megatron.bridge.mimo import MimoParallelismConfig, ModuleParallelismConfig
from megatron.bridge.recipes.mimo.digits import FEATURES, IMAGE, START, VOCABULARY, WHICH, digits_vlm_config
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.callbacks import Callback

LENGTH = FEATURES + 4
ENCODER = "megatron.bridge.mimo.energon_images:ImageTextEncoder"


def digits(count: int) -> list[tuple[bytes, int]]:
    """scikit-learn's images as PNG, and which digit they are."""
    import PIL.Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    found = []
    for pixels, label in zip(images[:count].reshape(-1, 8, 8), labels[:count], strict=True):
        data = io.BytesIO()
        PIL.Image.fromarray((pixels * 15).astype("uint8")).save(data, "png")
        found.append((data.getvalue(), int(label)))
    return found


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SigLIP's image processor, for images of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("processor")
    settings = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 digits with their names as captions, in 6 shards, the last for validation."""
    energon = pytest.importorskip("megatron.energon.flavors")
    from megatron.energon.epathlib import EPath

    root = tmp_path_factory.mktemp("shards")
    found = digits(96)
    for shard in range(6):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for number in range(16 * shard, 16 * shard + 16):
                image, digit = found[number]
                for kind, data in (("png", image), ("txt", str(digit).encode())):
                    entry = tarfile.TarInfo(f"{number:04}.{kind}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    names, parts = [f"{shard}.tar" for shard in range(6)], [("train", 5 / 6), ("val", 1 / 6)]
    energon.BaseWebdatasetFactory.prepare_dataset(
        EPath(root), names, split_parts_ratio=parts, shuffle_seed=None, workers=1
    )
    about = "sample_type: {__module__: megatron.energon, __class__: CaptioningSample}\n"
    (root / ".nv-meta" / "dataset.yaml").write_text(about + "field_map: {image: png, caption: txt}\n")
    return root


class Drawn(Callback):
    """Of each micro-batch on this rank: its digits, and the sum of its pixels."""

    def __init__(self) -> None:
        self.found: list[tuple[list[int], float]] = []

    def on_batch(self, run: Any, batch: Any) -> None:
        said = batch["labels"][batch["loss_mask"] > 0].tolist()
        pixels = batch["modality_inputs"]["images"]["pixel_values"]
        # An answer ends with the last id.
        answers = [each for each in said if each != VOCABULARY - 1]
        assert said.count(VOCABULARY - 1) == len(pixels)
        self.found.append((answers, round(float(pixels.double().sum()), 3)))


def placed(mode: str, encoder: dict[str, int], language: dict[str, int]) -> MimoParallelismConfig:
    modules = {"images": ModuleParallelismConfig(**encoder), "language_module": ModuleParallelismConfig(**language)}
    if mode == "heterogeneous":
        modules["language_module"].rank_offset = modules["images"].total_ranks
    return MimoParallelismConfig(llm_module_name="language_module", deployment_mode=mode, module_parallelisms=modules)


PLACEMENTS = {
    "one rank": ("homogeneous", {}, {}),
    "homogeneous DP2": ("homogeneous", {"data_parallel": 2}, {"data_parallel": 2}),
    "colocated": ("colocated", {"data_parallel": 2}, {"tensor_parallel": 2}),
    # The encoder's ranks take half each of what the language model takes whole.
    "heterogeneous": ("heterogeneous", {"data_parallel": 2}, {}),
    "1 + DP2": ("heterogeneous", {}, {"data_parallel": 2}),
}


def run_of(name: str, dataset: Any, **checkpoint: Any) -> Any:
    """A run of a few steps on digits that are not those of the recipe."""
    from megatron.bridge.training.config import CheckpointConfig

    mode, encoder, language = PLACEMENTS[name]
    cfg = digits_vlm_config("colocated")
    cfg.model.placement = placed(mode, encoder, language)
    cfg.model.encoders["images"].hf_config = {**cfg.model.encoders["images"].hf_config, "num_channels": 3}
    cfg.model.seq_length, cfg.dataset = dataset.sequence_length, dataset
    cfg.train.train_iters, cfg.train.global_batch_size = 2, 8
    cfg.train.micro_batch_size = 4 // language.get("data_parallel", 1)
    cfg.train.eval_interval, cfg.train.eval_iters = None if getattr(dataset, "packed", False) else 1, 1
    cfg.logger.progress = False
    cfg.checkpoint = CheckpointConfig(**checkpoint)
    return cfg


def trained(cfg: Any) -> tuple[list[tuple[list[int], float]], Any]:
    from megatron.bridge.mimo.mimo_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    drawn = Drawn()
    result = pretrain(cfg, forward_step, [drawn])
    return drawn.found, result


def form(processor: str) -> dict[str, Any]:
    return {
        **{"processor": processor, "image_token_id": IMAGE, "tokens_per_image": FEATURES},
        "prompt": f"{START} {{image}} {WHICH}",
    }


def energon_of(shards: Path, processor: str) -> Any:
    from megatron.bridge.data import EnergonDatasetConfig

    return EnergonDatasetConfig(
        path=str(shards),
        sequence_length=LENGTH,
        task_encoder=ENCODER,
        task_encoder_options=form(processor),
        shuffle_buffer_size=16,
    )


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 digits, each said one to three times, as a Hugging Face dataset."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("arrow") / "digits"
    rows = [
        {"image": {"bytes": image, "path": None}, "text": " ".join([str(digit)] * (1 + number % 3))}
        for number, (image, digit) in enumerate(digits(40))
    ]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder)
    return folder


def packed_of(on_disk: Path, processor: str) -> Any:
    from megatron.bridge.mimo.image_text_dataset import ImageTextDatasetConfig

    return ImageTextDatasetConfig(
        path=str(on_disk), split="1,0,0", packed=True, sequence_length=3 * LENGTH, **form(processor)
    )


# The colocated language model begins with other weights than those of one rank.
PACKED = ("one rank", "homogeneous DP2", "heterogeneous")
RESUMED = ("homogeneous DP2", "colocated", "heterogeneous")


@pytest.fixture(scope="module")
def runs(shards: Path, on_disk: Path, processor: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By placement, of each rank: what it drew and what came out, and the same of a run from its middle on."""
    import PIL.Image

    from megatron.bridge.mimo import energon_images

    # What samples need is imported before ranks are forked.
    blank, ids = PIL.Image.new("RGB", (8, 8)), NullTokenizer(VOCABULARY)
    energon_images.ImageText(**form(processor)).sample(ids, blank, "", "1", longest=LENGTH, origin="")
    folder = tmp_path_factory.mktemp("runs")

    def stream(name: str, **settings: Any) -> Any:
        return trained(run_of(name, energon_of(shards, processor), **settings))

    def work(names: Sequence[str]) -> dict[str, Any]:
        gc.freeze()  # energon collects garbage often, and need not look at what was imported
        found: dict[str, Any] = {}
        for name in names:
            saved = str(folder / name)
            if name in RESUMED:
                found[name] = [stream(name, save=saved, save_interval=1), stream(name, load=saved, ckpt_step=1)]
            else:
                found[name] = [stream(name)]
            if name in PACKED:
                found[f"{name}, packed"] = trained(run_of(name, packed_of(on_disk, processor)))
        return found

    by_ranks = {1: ["one rank"], 2: ["homogeneous DP2", "colocated"], 3: ["heterogeneous", "1 + DP2"]}
    of_ranks = [run_ranks(ranks, work, names, timeout=300) for ranks, names in by_ranks.items()]
    return {name: [each[name] for each in every] for every in of_ranks for name in every[0]}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_reads_and_learns_what_the_whole_one_did(runs: dict[str, list[Any]], name: str) -> None:
    for (drawn, whole), (late, rest) in runs[name]:
        # Two micro-batches in a step, and an evaluation of two behind each.
        assert drawn[len(drawn) // 2 :] == late
        assert rest.losses == {step: loss for step, loss in whole.losses.items() if step > 1}
        assert rest.valid_loss == whole.valid_loss


def test_all_modules_read_the_same_samples_of_a_stream(runs: dict[str, list[Any]]) -> None:
    whole = {name: [each[0] for each in runs[name]] for name in PLACEMENTS}
    ((one, result),) = whole["one rank"]
    assert len({str(each) for each in one}) == len(one) > 3  # samples differ from step to step
    # A stream that is read whole is that of one rank, wherever modules stand; each has its part of the samples.
    for name, halves in (("heterogeneous", (0, 1)), ("1 + DP2", (1, 2))):
        (undivided,) = {0, 1, 2} - {*halves}
        assert whole[name][undivided][0] == one
        for step, (answers, pixels) in enumerate(one):
            first, second = (whole[name][half][0][step] for half in halves)
            assert first[0] + second[0] == answers
            assert first[1] + second[1] == pytest.approx(pixels, abs=1e-2)
        for _, placed_result in whole[name]:
            assert placed_result.losses == pytest.approx(result.losses, abs=1e-5)
    assert [drawn for drawn, _ in whole["colocated"]] == [one, one]
    first, second = (drawn for drawn, _ in whole["homogeneous DP2"])
    assert first != second


def test_packed_rows_of_a_dataset_on_disk_train_alike_at_every_placement(runs: dict[str, list[Any]]) -> None:
    drawn, result = runs["one rank, packed"][0]
    assert all(len(answers) > 8 for answers, _ in drawn)  # several documents in each of 4 samples
    for name in PACKED[1:]:
        for _, found in runs[f"{name}, packed"]:
            assert found.losses == pytest.approx(result.losses, abs=1e-5), name
