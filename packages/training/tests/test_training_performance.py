"""What a run says of its speed is what was measured, and its operations are those that torch counts."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron.bridge import platform
from megatron.bridge.models.mla_provider import MLAModelProvider
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.flops import forward_flops_per_token, step_flops
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.loggers.jsonl import METRICS_FILE
from megatron.bridge.training.peaks import peak_tflops
from megatron.bridge.training.phases import PHASES, Phases
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.validation import ConfigError

EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 40,
    "moe_layer_freq": [0, 1, 1, 0],
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "plain MLP, wide heads": {"gated_linear_unit": False, "num_query_groups": 4, "kv_channels": 24},
    "experts": EXPERTS,
    "experts in each second layer": EXPERTS | {"moe_layer_freq": 2, "moe_shared_expert_intermediate_size": None},
    "prediction layers": {"mtp_num_layers": 2},
    "latent attention": LATENT | {"num_query_groups": None, "q_lora_rank": None},
    "latent queries": LATENT | {"num_query_groups": None, "q_lora_rank": 16},
}


def test_operations_are_those_that_torch_counts(make_model: Callable[..., Any]) -> None:
    def work() -> dict[str, tuple[float, float]]:
        found = {}
        for name, fields in MODELS.items():
            provider = make_model()
            if "kv_lora_rank" in fields:
                shared = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
                shared += ("seq_length", "normalization", "gated_linear_unit", "activation_func", "add_bias_linear")
                provider = MLAModelProvider(**{name: getattr(provider, name) for name in shared})
            for field, value in fields.items():
                setattr(provider, field, value)
            provider.initialize_model_parallel(1)
            model = provider.provide()
            tokens = torch.randint(0, 128, (3, provider.seq_length))
            positions = torch.arange(provider.seq_length).expand(3, -1)
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(tokens, positions, None, labels=tokens)
            counted = counter.get_total_flops() / tokens.numel()
            found[name] = (forward_flops_per_token(provider), counted)
        return found

    found = run_ranks(1, work, timeout=120)[0]
    assert found.keys() == MODELS.keys()
    for name, (formula, counted) in found.items():
        assert formula == counted > 0, name


def test_a_step_is_three_forward_passes(make_model: Callable[..., Any]) -> None:
    model = make_model()
    assert step_flops(model, 8) == 3 * 8 * 16 * forward_flops_per_token(model)

    class Other(type(model)):  # type: ignore[misc]
        """A model of another kind."""

    model.__class__ = Other
    assert step_flops(model, 8) is None


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "float16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "float32", None),
        ("NVIDIA RTX A1000", "bfloat16", None),
        (None, "bfloat16", None),
    ],
)
def test_peaks_are_given_where_they_are_known(name: str | None, dtype: str, peak: float | None) -> None:
    assert peak_tflops(name, dtype) == peak


def test_time_counts_for_the_innermost_phase() -> None:
    phases = Phases()

    def slow() -> Any:
        time.sleep(0.03)
        yield 1

    begin = time.perf_counter()
    with phases.step(), phases("forward_backward"):
        assert list(phases.waiting(slow())) == [1]
        time.sleep(0.02)
    whole = time.perf_counter() - begin
    step, seconds = phases.taken()
    by_phase = dict(zip(PHASES, seconds, strict=True))
    assert by_phase["data_wait"] >= 0.03
    assert 0.02 <= by_phase["forward_backward"] <= whole - 0.03
    assert 0.05 <= sum(seconds) <= step <= whole
    assert phases.taken() == (0.0, [0.0] * len(PHASES))


def test_each_phase_is_told_with_its_times() -> None:
    phases, told = Phases(), []
    phases.told = lambda *span: told.append(span)
    with phases.step(), phases("forward_backward"), phases("gradient_sync"):
        time.sleep(0.02)
    assert [name for name, _, _ in told] == ["gradient_sync", "forward_backward", "other"]
    assert all(end - begin >= 0.02 for _, begin, end in told)
    assert told[2][1] <= told[1][1] <= told[0][1] < told[0][2] <= told[1][2] <= told[2][2]


def test_phases_are_means_over_the_steps_in_which_they_were_told_apart() -> None:
    phases = Phases()
    for told_apart, seconds in ((False, 0.06), (True, 0.02)):
        phases.told_apart = told_apart
        with phases.step(), phases("optimizer"):
            time.sleep(seconds)
    step, by_phase = phases.taken()
    assert 0.04 <= step < 0.06
    assert 0.02 <= by_phase[PHASES.index("optimizer")] < 0.04


def test_the_device_is_waited_for_in_logged_steps_only(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def waited(**settings: Any) -> int:
        calls: list[None] = []
        monkeypatch.setattr(platform, "synchronize", lambda: calls.append(None))
        pretrain(make_run({}, train_iters=5, global_batch_size=1, **settings), forward_step)
        return len(calls)

    # The last step is always logged.
    assert run_ranks(1, waited, timeout=60) == [5]
    assert run_ranks(1, lambda: waited(log_interval=2), timeout=60) == [3]
    assert run_ranks(1, lambda: waited(log_interval=2, straggler_factor=2.0), timeout=60) == [5]


def test_a_run_says_how_fast_it_is_and_who_holds_it_up(
    make_run: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def slow(run: Any, data: Any, model: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            time.sleep(0.4)
        return forward_step(run, data, model)

    cfg = make_run({}, train_iters=4, log_interval=2, global_batch_size=2, folder=str(tmp_path), progress=True)
    cfg.logger.peak_tflops, cfg.logger.straggler_factor = 1e-3, 1.5
    run_ranks(2, pretrain, cfg, slow, timeout=60)
    records = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [record["iteration"] for record in records] == [2, 4]
    record = records[-1]
    assert record["forward_backward_seconds"] >= 0.4
    assert record["gradient_sync_seconds"] >= 0.2  # rank 0 waits for rank 1
    assert record["step_seconds"] <= 1.1 * sum(record[f"{phase}_seconds"] for phase in PHASES)  # all told apart
    tflops = step_flops(cfg.model, 2) / record["step_seconds"] / 2 / 1e12
    assert record["tflops_per_device"] == pytest.approx(tflops)
    assert record["mfu"] == pytest.approx(tflops / 1e-3)
    assert 0.1 < record["memory_gib"] < 20
    told = capfd.readouterr().out
    assert "rank 1 is slow in forward_backward: 0." in told
    assert " TFLOP/s | MFU " in told
    assert " GiB | ETA" in told


@pytest.mark.parametrize(("setting", "value"), [("peak_tflops", 0.0), ("straggler_factor", 1.0)])
def test_bad_settings_are_refused(setting: str, value: float, make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    setattr(cfg.logger, setting, value)
    with pytest.raises(ConfigError, match=f"logger.{setting}={value} must be greater"):
        cfg.validate(1)
