"""Images and texts become the samples that transformers' processors make of them; what cannot is refused."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.data import DatasetBuildContext
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import collate
from megatron.bridge.mimo.image_text import ImageText, filled_up
from megatron.bridge.mimo.image_text_dataset import ImageTextDatasetConfig

PIL_Image = pytest.importorskip("PIL.Image")
FEATURES, SIDE = 16, 8
PROMPT = "USER: {image}\nWhat is {question}? ASSISTANT:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE of English with `<image>`, and CLIP's image processor for small images."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    made = tmp_path_factory.mktemp("llava")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<end>", "<image>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<end>", extra_special_tokens={"image": "<image>"}
    )
    wrapped.save_pretrained(made)
    size = {"height": SIDE, "width": SIDE}
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": size}
    (made / "preprocessor_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from megatron.bridge.data.tokenizers import TokenizerConfig, build_tokenizer

    return build_tokenizer(TokenizerConfig(tokenizer_model=str(folder)))


def picture(width: int = 11, height: int = 9) -> Any:
    draw = torch.Generator().manual_seed(width)
    pixels = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    return PIL_Image.fromarray(pixels.numpy())


def form(folder: Path, **changes: Any) -> ImageText:
    given = {"processor": str(folder), "image_token_id": 1, "tokens_per_image": FEATURES, "prompt": PROMPT}
    return ImageText(**{**given, **changes})


def made_of(form: ImageText, tokenizer: Any, answer: str = " a list of names", longest: int = 200) -> dict[str, Any]:
    return form.sample(tokenizer, picture(), "a module", answer, longest=longest, origin="sample 'x'")


def test_a_sample_is_what_transformers_processor_makes_of_it(folder: Path, tokenizer: Any) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

    processor = LlavaProcessor(
        AutoImageProcessor.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        patch_size=SIDE // 4,
        vision_feature_select_strategy="full",
        image_token="<image>",
    )
    asked = "USER: <image>\nWhat is a module? ASSISTANT:"
    theirs = processor(text=asked, images=picture(), return_tensors="pt")
    whole = processor(text=asked + " a list of names<end>", images=picture(), return_tensors="pt")["input_ids"][0]
    sample = made_of(form(folder), tokenizer)
    assert sample["tokens"].equal(whole[:-1])
    assert sample["modality_inputs"]["images"]["pixel_values"].equal(theirs["pixel_values"])
    assert int((sample["tokens"] == 1).sum()) == FEATURES
    trained = sample["loss_mask"] > 0
    answer = whole[theirs["input_ids"].shape[1] :]
    assert len(answer) > 3
    assert sample["labels"][trained].equal(answer)  # and its end, and nothing else
    assert sample["labels"][~trained].ne(1).all()
    assert form(folder).length(tokenizer, "a module", " a list of names") == len(sample["tokens"])


def test_images_of_several_sizes_have_the_places_that_their_grids_say(tmp_path: Path, tokenizer: Any) -> None:
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2}
    settings |= {"min_pixels": 64, "max_pixels": 1024}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    several = form(tmp_path, tokens_per_image=None)
    samples = [
        several.sample(tokenizer, picture(*size), "it", "this", longest=90, origin="") for size in ((24, 16), (8, 40))
    ]
    batch = collate([filled_up(sample, 90, 0) for sample in samples])
    images = batch["modality_inputs"]["images"]
    assert images["items"].tolist() == [1, 1]
    assert images["image_grid_thw"].tolist() == [[1, 4, 6], [1, 10, 2]]
    assert (batch["tokens"] == 1).sum(1).tolist() == [6, 5]
    assert several.length(tokenizer, "", "") is None


def test_what_is_longer_is_refused_or_cut_behind_the_question(folder: Path, tokenizer: Any) -> None:
    whole = made_of(form(folder), tokenizer)
    length = len(whole["tokens"])
    with pytest.raises(BridgeError, match=f"sample 'x' has {length} tokens, .* and {length - 2} fit; .*'right'"):
        made_of(form(folder), tokenizer, longest=length - 2)
    cut = made_of(form(folder, truncation="right"), tokenizer, longest=length - 2)
    assert cut["tokens"].equal(whole["tokens"][:-2])
    assert cut["labels"].equal(whole["labels"][:-2])
    assert cut["loss_mask"].sum() == whole["loss_mask"].sum() - 2
    with pytest.raises(BridgeError, match=r"20 fit; raise dataset.sequence_length$"):
        made_of(form(folder, truncation="right"), tokenizer, longest=20)


def test_settings_that_cannot_work_are_named(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    wrong = ImageText(prompt="{question}", tokens_per_image=0)
    wrong.truncation = "left"  # type: ignore[assignment]
    told = "; ".join(wrong.problems())
    for said in ("processor is not set", "image_token_id is not set", "must have {image} once", "at least 1", "'left'"):
        assert said in told
    with pytest.raises(BridgeError, match="does not say how many features an image has; set tokens_per_image"):
        made_of(form(folder, tokens_per_image=None), tokenizer)
    with pytest.raises(BridgeError, match=r"gives no image processor of transformers.*preprocessor_config.json"):
        made_of(form(tmp_path), tokenizer)


def test_energons_samples_with_captions_and_questions(folder: Path, tokenizer: Any) -> None:
    energon = pytest.importorskip("megatron.energon")
    from megatron.bridge.mimo.energon_images import ImageTextEncoder

    with pytest.raises(BridgeError, match="dataset.task_encoder_options: processor is not set; image_token_id"):
        ImageTextEncoder(80, tokenizer)
    encoder = ImageTextEncoder(80, tokenizer, **vars(form(folder)))
    shared = {"__key__": "k", "__restore_key__": (), "image": picture()}

    def said(sample: Any) -> str:
        made = encoder.encode_sample(sample)
        assert len(made["tokens"]) == 80
        return str(tokenizer.detokenize(made["labels"][made["loss_mask"] > 0].tolist()))

    assert said(energon.CaptioningSample(**shared, caption="a picture")) == "a picture<end>"
    answers = {"context": "it", "answers": ["one", "two"]}
    assert said(energon.VQASample(**shared, **answers)) == "one<end>"
    assert said(energon.VQASample(**shared, **answers, answer_weights=torch.tensor([0.2, 0.8]))) == "two<end>"
    with pytest.raises(BridgeError, match="sample 'k' has no answer"):
        said(energon.VQASample(**shared, context="it"))
    with pytest.raises(BridgeError, match="sample 'k' is a TextSample; ImageTextEncoder takes CaptioningSample and"):
        said(energon.TextSample(__key__="k", __restore_key__=(), text="text"))


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> ImageTextDatasetConfig:
    """Six rows with images, questions and answers."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": picture(8 + row), "asked": f"number {row}", "said": f"it is {row}" * (1 + row)} for row in range(6)
    ]
    features = {"image": datasets.Image(), "asked": datasets.Value("string"), "said": datasets.Value("string")}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "rows")
    columns = {"question_column": "asked", "answer_column": "said", "split": "2,1,0"}
    return ImageTextDatasetConfig(path=str(tmp_path / "rows"), sequence_length=90, **columns, **vars(form(folder)))


def test_rows_of_a_dataset_on_disk_are_samples(config: ImageTextDatasetConfig, tokenizer: Any) -> None:
    from transformers import AutoImageProcessor

    context = DatasetBuildContext(valid_samples=2, tokenizer=tokenizer)
    config.validate(context)
    train, valid, test = config.build_train_valid_test_datasets(context)
    assert (len(train), len(valid), test) == (4, 2, None)  # type: ignore[arg-type]
    processor, said = AutoImageProcessor.from_pretrained(str(config.processor)), set()
    for split in (train, valid):
        for index in range(len(split)):  # type: ignore[arg-type]
            sample = split[index]  # type: ignore[index]
            text = tokenizer.detokenize(sample["tokens"][sample["tokens"] != tokenizer.eod].tolist())
            row = int(text.partition("number ")[2][0])
            assert text == f"USER: {'<image>' * FEATURES}\nWhat is number {row}? ASSISTANT:" + f"it is {row}" * (
                1 + row
            )
            pixels = processor(picture(8 + row), return_tensors="pt")["pixel_values"]
            assert sample["modality_inputs"]["images"]["pixel_values"].equal(pixels)
            said.add(row)
    assert said == set(range(6))


def test_rows_are_packed_without_a_look_at_their_images(config: ImageTextDatasetConfig, tokenizer: Any) -> None:
    config.packed, config.split, config.sequence_length = True, "1,0,0", 150
    train, *_ = config.build_train_valid_test_datasets(DatasetBuildContext(tokenizer=tokenizer))
    batch = collate([train[index] for index in range(len(train))])  # type: ignore[index, arg-type]
    assert int(batch["modality_inputs"]["images"]["items"].sum()) == 6
    assert len(train) < 6  # type: ignore[arg-type]
    assert train.efficiency > 0.5  # type: ignore[union-attr]


def test_datasets_that_cannot_be_read_are_refused(config: ImageTextDatasetConfig, tokenizer: Any) -> None:
    context = DatasetBuildContext(tokenizer=tokenizer)
    changes: dict[str, tuple[Any, str]] = {
        "answer_column": ("sad", "has no column 'sad'; did you mean 'said'"),
        "path": ("nowhere", "'nowhere' is no Hugging Face dataset on disk; write one with Dataset.save_to_disk"),
        "sequence_length": (0, "dataset.sequence_length=0 must be at least 1"),
        "image_token_id": (None, "dataset.image_token_id is not set"),
        "split": ("1,-1", "negative"),
    }
    for name, (value, told) in changes.items():
        kept = getattr(config, name)
        setattr(config, name, value)
        with pytest.raises(BridgeError, match=told):
            config.validate(context)
        setattr(config, name, kept)
    with pytest.raises(BridgeError, match="need a tokenizer"):
        config.validate(DatasetBuildContext())
    config.image_column = "asked"
    train, *_ = config.build_train_valid_test_datasets(context)
    with pytest.raises(BridgeError, match="row . of .* has no image as Hugging Face's Image feature stores it"):
        train[0]  # type: ignore[index]
    (file,) = Path(config.path or "").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(BridgeError, match=r"rows/data.*\.arrow cannot be read as Arrow"):
        config.build_train_valid_test_datasets(context)
