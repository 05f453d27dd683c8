"""Runs the steps one after another and shows them in one table."""

import time
from collections.abc import Callable
from typing import Any

import click

from megatron.bridge.training.quickstart import stages
from megatron.bridge.training.quickstart.journal import Journal, Step
from megatron.bridge.training.quickstart.stages import Paths

# Imported once, before the ranks are forked.
_MODULES = (
    "megatron.bridge.conversion.verify",
    "megatron.bridge.data.datasets.gpt_build",
    "megatron.bridge.models.gpt_provider",
    "megatron.bridge.models.gpt_model",
    "megatron.bridge.training.setup",
    "megatron.bridge.training.train",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)
EXIT_INTERRUPTED = 130  # 128 + SIGINT


class Interrupted(Exception):
    """Training was asked to stop and has saved a checkpoint."""


def run(journal: Journal) -> None:
    """Do what is left to do, then print the table.

    Raises:
        BridgeError: a step was refused or a proof failed; what was done stays, and the same command goes on from there.
    """
    from megatron.bridge.platform.engine import import_engine

    click.echo("importing torch and Megatron-Core ...")
    import_engine(*_MODULES)
    options = journal.options
    paths = Paths(journal.folder, options.hf or journal.folder / "model")
    half = options.steps // 2
    try:
        if options.hf is None:
            _step(journal, "make a model", lambda: _make_model(paths, options.seq_length))
        _step(journal, f"convert to Megatron (TP={options.tp} PP={options.pp})", lambda: _convert(paths, journal))
        _step(journal, "preprocess the text", lambda: _preprocess(paths, journal))
        _step(journal, f"train steps 1-{half}", lambda: _train(paths, journal, half))
        _step(journal, f"resume, train steps {half + 1}-{options.steps}", lambda: _train(paths, journal, options.steps))
        _step(journal, "export to Hugging Face", lambda: _export(paths, journal))
        _step(journal, "load in plain transformers", lambda: _prove(paths, journal))
        lines = _forked(1, stages.generate, paths.export)
    except (KeyboardInterrupt, Interrupted) as stopped:
        click.echo(f"\n{stopped or 'interrupted'}\ngo on with the same command; everything is in {journal.folder}")
        raise SystemExit(EXIT_INTERRUPTED) from None
    _show(journal, lines)


def _step(journal: Journal, name: str, work: Callable[[], str]) -> None:
    if journal.done(name):
        click.echo(f"{name}: done before")
        return
    click.echo(f"{name} ...")
    started = time.perf_counter()
    proof = work()
    journal.record(Step(name, time.perf_counter() - started, proof))


def _forked(ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    """Rank 0's result; even one rank is forked, so that this process stays fit for forking."""
    from megatron.bridge.platform.launch import run_ranks, share_of_cores

    return run_ranks(ranks, function, *args, timeout=None, threads=share_of_cores(ranks))[0]


def _make_model(paths: Paths, positions: int) -> str:
    return str(_forked(1, stages.make_model, paths.hf, positions))


def _convert(paths: Paths, journal: Journal) -> str:
    return _certified(_forked(journal.options.ranks, stages.convert, paths, journal.options))


def _certified(certificate: Any) -> str:
    certificate.refuse_failure()
    return (
        f"{certificate.weights_compared} weights bitwise equal; "
        f"logits differ by {certificate.logit_difference:.1e} relative"
    )


def _preprocess(paths: Paths, journal: Journal) -> str:
    counted = stages.preprocess(paths, journal.options.text)
    return f"{counted.tokens:,} tokens in {counted.documents:,} documents"


def _train(paths: Paths, journal: Journal, until: int) -> str:
    from megatron.bridge.platform.launch import signals_left_to_ranks

    started = time.perf_counter()
    with signals_left_to_ranks():
        result = _forked(journal.options.ranks, stages.train, paths, journal.options, until)
    if result.stopped_by != "train_iters":
        raise Interrupted(f"stopped by {result.stopped_by} after step {result.iteration}; saved in {result.checkpoint}")
    tokens = len(result.losses) * journal.options.batch * journal.options.seq_length
    speed = tokens / (time.perf_counter() - started)
    return f"loss {_loss_curve(list(result.losses.values()))}; {speed:,.0f} tokens/s with start and saving"


def _loss_curve(losses: list[float], window: int = 10) -> str:
    """First loss -> mean of the last steps; one step's loss varies with its texts."""
    last = losses[-window:]
    return f"{losses[0]:.3f} -> {sum(last) / len(last):.3f} (mean of {len(last)} steps)"


def _export(paths: Paths, journal: Journal) -> str:
    return f"{_forked(journal.options.ranks, stages.export, paths, journal.options)} files, complete and verified"


def _prove(paths: Paths, journal: Journal) -> str:
    return _certified(_forked(journal.options.ranks, stages.prove_export, paths, journal.options))


def _show(journal: Journal, lines: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for line in lines:
        console.rule("generated", style="dim", align="left")
        console.print(line, markup=False, highlight=False)
    table = Table("step", "seconds", "proof", title="megatron-bridge quickstart")
    table.columns[1].justify = "right"
    for step in journal.steps:
        table.add_row(step.name, f"{step.seconds:.1f}", step.proof)
    table.add_section()
    table.add_row("all", f"{sum(step.seconds for step in journal.steps):.1f}", f"everything is in {journal.folder}/")
    console.print(table)
