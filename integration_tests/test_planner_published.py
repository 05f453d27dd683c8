"""The planner beside what NVIDIA published: operations per second, and the time of a step.

Source: NVIDIA NeMo Framework user guide, performance summary of pre-training on DGX H100 in FP8 (releases of 2024). Its
two columns, tokens and TFLOP per second and GPU, check each other: our operations per token join them.
"""

import statistics
from collections.abc import Iterable
from itertools import product

import pytest
from small_models import REPOSITORY

from megatron.bridge.training.planner import step_time
from megatron.bridge.training.planner.hardware import cluster
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
    """Of every choice of the shares: each row's relative error."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for choice in product(*SHARES.values()):
            for share, value in zip(SHARES, choice, strict=True):
                patch.setattr(step_time, share, value)
            times = {name: predicted(name) for name in PUBLISHED}
            found[choice] = {name: planned_seconds / seconds - 1 for name, (seconds, planned_seconds) in times.items()}
    return found


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
