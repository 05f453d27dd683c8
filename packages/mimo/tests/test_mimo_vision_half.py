"""Which Hugging Face models can be taken apart: those whose images give the language model features, and no more."""

import pytest
import torch
import transformers

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.vision_half import VisionHalf


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration has features that are added between layers"),
        ("Gemma3Config", "Gemma3ForConditionalGeneration has attention that images decide"),
        ("LlamaConfig", "LlamaForCausalLM has no vision half"),
    ],
)
def test_what_cannot_stand_apart_is_refused_by_name(config, told):
    architecture = told.split()[0]
    made = getattr(transformers, config)(architectures=[architecture])
    with pytest.raises(BridgeError, match=told):
        VisionHalf.of(AutoBridge.from_hf_config(made))


IMAGE, VIDEO = 100, 101
GRIDS = torch.tensor([[1, 4, 4], [1, 8, 4], [1, 4, 6]])


def qwen() -> VisionHalf:
    made = transformers.Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"], image_token_id=IMAGE, video_token_id=VIDEO
    )
    made.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return VisionHalf.of(AutoBridge.from_hf_config(made))


def test_images_of_several_sizes_are_told_apart_by_their_grids():
    rows = torch.arange(int(GRIDS.prod(1).sum()))[:, None]
    inputs = {"pixel_values": rows, "image_grid_thw": GRIDS}
    assert qwen().count(inputs) == 3
    assert qwen().count({}) == 0
    last = qwen().take(inputs, 1, 3)
    assert last["image_grid_thw"].equal(GRIDS[1:])
    assert last["pixel_values"].equal(rows[16:])
    assert len(qwen().take(inputs, 2, 2)["pixel_values"]) == 0


def test_positions_are_those_of_transformers():
    tokens = torch.full((2, 24), 7)
    tokens[0, 2:6] = tokens[0, 9:17] = tokens[1, 4:10] = IMAGE  # 4, 8 and 6 features
    found = qwen().positions(tokens, {"pixel_values": torch.zeros(1), "image_grid_thw": GRIDS})
    model = object.__new__(transformers.Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = qwen().vision.hf_config
    theirs, _ = model.get_rope_index(tokens, (tokens == IMAGE).int(), image_grid_thw=GRIDS)
    assert found.equal(theirs)
    assert found.shape == (3, 2, 24)
    assert found[0, 0, 6] - found[0, 0, 5] == 2  # what follows an image goes on behind its longer side
    assert qwen().positions(tokens * 0 + 7, {}).equal(torch.arange(24).expand(3, 2, 24))


def test_tokens_of_a_video_are_refused_by_sample():
    tokens = torch.full((2, 8), 7)
    tokens[1, 3] = VIDEO
    with pytest.raises(BridgeError, match="sample 1 has video tokens .* take images alone"):
        qwen().positions(tokens, {})
