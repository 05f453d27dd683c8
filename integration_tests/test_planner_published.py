"""The planner beside what NVIDIA published: operations per second, and the time of a step.

Source: NVIDIA NeMo Framework user guide, performance summary of pre-training on DGX H100 in FP8 (releases of 2024). Its
two columns, tokens and TFLOP per second and GPU, check each other: our operations per token join them.
"""

import statistics
from collections.abc import Iterable
from itertools import product

import pytest
from small_models import REPOSITORY

from megatron.bridge.recipes.base.families import sizes
from megatron.bridge.training.planner import step_time
from megatron.bridge.training.planner.hardware import cluster
from megatron.bridge.training.planner.hf_reading import shape_of_hf
from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.plan import Question, planned, step_operations
from megatron.bridge.training.planner.precision import Bytes
from megatron.bridge.training.planner.shape import ModelShape

PAGE = REPOSITORY / "docs/planner.md"


def gpt(layers: int, hidden: int, heads: int, vocabulary: int, length: int) -> ModelShape:
    return ModelShape(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, vocab_size=vocabulary, seq_length=length
    )


def llama(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocabulary: int, length: int) -> ModelShape:
    return gpt(layers, hidden, heads, vocabulary, length).replace(
        ffn_hidden_size=ffn,
        num_query_groups=groups,
        gated_linear_unit=True,
        normalization="RMSNorm",
        add_bias_linear=False,
    )


# Model -> sizes, GPUs, sequences per step, layout, and what was published: tokens and TFLOP per second and GPU.
PUBLISHED = {
    "GPT-3 20B": (gpt(44, 6144, 48, 51200, 2048), 64, 256, "TP2 MB2", 5528, 708),
    "Llama 2 7B": (llama(32, 4096, 11008, 32, 32, 32000, 4096), 8, 128, "MB1", 16290, 751),
    "Llama 2 13B": (llama(40, 5120, 13824, 40, 40, 32000, 4096), 16, 128, "PP4 VPP10 MB1", 8317, 725),
    "Llama 2 70B": (llama(80, 8192, 28672, 64, 8, 32000, 4096), 64, 128, "TP4 PP4 VPP20 MB1", 1725, 767),
    "Nemotron 8B": (gpt(32, 4096, 32, 256000, 4096), 64, 256, "TP2 MB4", 11538, 593),
    "Nemotron 22B": (gpt(40, 6144, 48, 256000, 4096), 64, 256, "TP2 PP4 VPP10 MB2", 3828, 499),
    "Llama 3 8B": (llama(32, 4096, 14336, 32, 8, 128256, 8192), 8, 128, "CP2 MB1", 12273, 711),
    "Llama 3 70B": (llama(80, 8192, 28672, 64, 8, 128256, 8192), 64, 128, "TP4 PP8 VPP5 MB1", 1524, 734),
}
# Gradients were reduced in bf16 and weights gathered in FP8 there.
SIZE = Bytes(gradient=2, gathered=1)


def predicted(name: str) -> tuple[float, float]:
    """Seconds of a step, as published and as planned."""
    shape, gpus, batch, layout, tokens, _ = PUBLISHED[name]
    question = Question(shape=shape, cluster=cluster(f"{gpus}xH100"), global_batch=batch, eight_bit=True, size=SIZE)
    return batch * shape.seq_length / gpus / tokens, planned(question, Layout.parse(layout)).time.total


# The shares that these rows decide about, and the values among which a fit may choose.
SHARES = {
    "PRODUCTS_8_BIT": [0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.70],
    "ATTENTION": [0.20, 0.30, 0.40, 0.50, 0.60],
    "TOUCHED": [0.0, 2.0, 4.0, 6.0, 8.0, 10.0],
}


@pytest.fixture(scope="module")
def errors() -> dict[tuple[float, ...], dict[str, float]]:
    """Of every choice of the shares: each row's relative error.

    A step's time is linear in the inverse of the first two shares and in the last, so four plans of a row tell all.
    """
    present = [getattr(step_time, share) for share in SHARES]
    with pytest.MonkeyPatch.context() as patch:
        seconds = {name: predicted(name) for name in PUBLISHED}
        slopes: dict[str, list[float]] = {name: [] for name in PUBLISHED}
        for share, value in zip(SHARES, present, strict=True):
            patch.setattr(step_time, share, 1.25 * value)
            for name, (_, planned_seconds) in seconds.items():
                step = _term(share, 1.25 * value) - _term(share, value)
                slopes[name].append((predicted(name)[1] - planned_seconds) / step)
            patch.setattr(step_time, share, value)

    def error(name: str, choice: tuple[float, ...]) -> float:
        moved = [
            slope * (_term(share, value) - _term(share, old))
            for share, slope, value, old in zip(SHARES, slopes[name], choice, present, strict=True)
        ]
        return (seconds[name][1] + sum(moved)) / seconds[name][0] - 1

    return {choice: {name: error(name, choice) for name in PUBLISHED} for choice in product(*SHARES.values())}


def _term(share: str, value: float) -> float:
    return value if share == "TOUCHED" else 1 / value


def fitted(errors: dict[tuple[float, ...], dict[str, float]], names: Iterable[str]) -> tuple[float, ...]:
    """The choice with the least mean error of these rows."""
    rows = list(names)
    return min(errors, key=lambda choice: statistics.mean(abs(errors[choice][name]) for name in rows))


def test_a_row_that_took_no_part_in_the_fit(errors: dict[tuple[float, ...], dict[str, float]]) -> None:
    """Each row is planned with shares that are fitted to the others: how the formula foretells."""
    left_out = {name: errors[fitted(errors, PUBLISHED.keys() - {name})][name] for name in PUBLISHED}
    median = statistics.median(map(abs, left_out.values()))
    worst = max(left_out, key=lambda name: abs(left_out[name]))
    assert median < 0.25
    told = f"the median error is {median:.0%}, and the largest {left_out[worst]:+.0%} ({worst})"
    assert told in PAGE.read_text("utf-8").replace("\n", " "), f"docs/planner.md should say: {told}; {left_out}"


# NVIDIA Megatron Bridge's documentation, performance summary of release 25.11: recipe, GPUs, whether in FP8, sequences
# per step and their length, layout, tokens per second and GPU, and layers where the model's own are not divided by the
# stages (the longest stage then has as many as with these). Rows with FSDP and on other GPUs are left out, and one that
# lacks a column.
RELEASE = {
    ("llama3_70b", "64xH100"): (True, 128, 8192, "TP4 PP8 VPP5 MB1", 1602, None),
    ("llama31_405b", "1024xH100"): (True, 512, 8192, "TP8 PP8 VPP8 CP2 MB1", 292, 128),
    ("llama3_8b", "8xB200"): (True, 128, 8192, "MB2", 30624, None),
    ("llama31_405b", "128xB200"): (True, 64, 8192, "TP4 PP8 VPP8 CP2 MB1", 661, 128),
    ("gpt_oss_120b", "64xH100"): (False, 512, 4096, "PP4 EP8 MB4", 5630, None),
    ("qwen3_30b_a3b", "16xH100"): (True, 512, 4096, "PP2 VPP24 EP8 MB2", 5275, None),
    ("gpt_oss_120b", "64xB200"): (False, 512, 4096, "EP8 MB4", 8213, None),
    ("qwen3_30b_a3b", "8xB200"): (True, 512, 4096, "EP8 MB1", 9299, None),
    ("qwen3_235b_a22b", "64xB200"): (True, 1024, 4096, "PP8 VPP2 EP8 MB1", 3269, 96),
    ("deepseek_v3", "256xB200"): (True, 2048, 4096, "PP16 EP8 MB1", 2139, 64),
}
EXPERTS = [key for key, given in RELEASE.items() if " EP8 " in f" {given[3]} "]
DENSE = [key for key in RELEASE if key not in EXPERTS]


def foretold(key: tuple[str, str]) -> tuple[float, float]:
    """Seconds of a step, as published and as planned."""
    name, gpus = key
    eight_bit, batch, length, layout, tokens, layers = RELEASE[key]
    config = dict(sizes()[name][1].hf_config)
    shape = shape_of_hf(config | ({} if layers is None else {"num_hidden_layers": layers})).replace(seq_length=length)
    size = SIZE if eight_bit else Bytes(gradient=2)
    question = Question(shape=shape, cluster=cluster(gpus), global_batch=batch, eight_bit=eight_bit, size=size)
    seconds = batch * length / int(gpus.partition("x")[0]) / tokens
    return seconds, planned(question, Layout.parse(layout)).time.total


def release_row(key: tuple[str, str]) -> str:
    seconds, planned_seconds = foretold(key)
    _, batch, _, layout, _, _ = RELEASE[key]
    error = planned_seconds / seconds - 1
    return f"| {key[0]} | {key[1]} | {batch} | {layout} | {seconds:.2f} | {planned_seconds:.2f} | {error:+.0%} |"


def test_dense_rows_of_a_later_release_took_no_part_in_any_fit() -> None:
    errors = {key: abs(planned_seconds / seconds - 1) for key in DENSE for seconds, planned_seconds in [foretold(key)]}
    assert len(errors) == 4
    assert max(errors.values()) < 0.1


def test_experts_are_foretold_by_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """`EXPERT_TOKEN` is fitted to the rows of experts; here to all of them but one, for each in turn."""
    found: dict[float, dict[tuple[str, str], float]] = {}
    for tenths in range(0, 41, 2):
        monkeypatch.setattr(step_time, "EXPERT_TOKEN", tenths * 1e-7)
        times = {key: foretold(key) for key in EXPERTS}
        found[tenths] = {key: planned_seconds / seconds - 1 for key, (seconds, planned_seconds) in times.items()}

    def fit(keys: list[tuple[str, str]]) -> float:
        return min(found, key=lambda tenths: statistics.mean(abs(found[tenths][key]) for key in keys))

    left_out = {key: found[fit([each for each in EXPERTS if each != key])][key] for key in EXPERTS}
    monkeypatch.undo()
    assert fit(EXPERTS) * 1e-7 == pytest.approx(step_time.EXPERT_TOKEN)
    median, worst = statistics.median(map(abs, left_out.values())), max(left_out, key=lambda key: abs(left_out[key]))
    assert median < 0.25
    told = f"median error of {median:.0%}, and {left_out[worst]:+.0%} at most ({worst[0]}, {worst[1]})"
    assert told in PAGE.read_text("utf-8").replace("\n", " "), f"docs/planner.md should say: {told}; {left_out}"


def test_rows_of_the_release_are_listed() -> None:
    missing = [release_row(key) for key in RELEASE if release_row(key) not in PAGE.read_text("utf-8")]
    assert not missing, "docs/planner.md should have:\n" + "\n".join(missing)


def row(name: str) -> str:
    _, gpus, batch, layout, _, _ = PUBLISHED[name]
    published, planned_seconds = predicted(name)
    error = planned_seconds / published - 1
    return f"| {name} | {gpus} | {batch} | {layout} | {published:.2f} | {planned_seconds:.2f} | {error:+.0%} |"


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_per_token_are_those_that_were_published(name: str) -> None:
    shape, gpus, batch, _, tokens, tflops = PUBLISHED[name]
    question = Question(shape=shape, cluster=cluster(f"{gpus}xH100"), global_batch=batch)
    per_token = step_operations(question) / (batch * shape.seq_length)
    assert tokens * per_token / 1e12 == pytest.approx(tflops, rel=0.002)


def test_step_times_are_near_and_listed() -> None:
    errors = {
        name: abs(planned_seconds / published - 1)
        for name in PUBLISHED
        for published, planned_seconds in [predicted(name)]
    }
    assert statistics.median(errors.values()) < 0.1
    assert max(errors.values()) < 0.4
    missing = [row(name) for name in PUBLISHED if row(name) not in PAGE.read_text("utf-8")]
    assert not missing, "docs/planner.md should have:\n" + "\n".join(missing)
