"""`megatron-bridge plan`: what a run will take, and how to divide it. Light until run, and torch-free."""

import json

import click


@click.command(name="plan")
@click.option("--recipe", help="Name of a recipe; `megatron-bridge recipes ls` lists ours.")
@click.option("--hf", metavar="FOLDER", help="Hugging Face folder or hub id of the model instead.")
@click.option("--gpus", required=True, metavar="64xH100", help="How many of what.")
@click.option("--seq", "seq_length", type=click.IntRange(min=1), help="Tokens per sequence, instead of the recipe's.")
@click.option("--global-batch-size", type=click.IntRange(min=1), help="Sequences per step.")
@click.option("--fp8", is_flag=True, help="Matrix products in 8 bits.")
@click.option("--at", metavar="LAYOUT", help="Look at one layout, e.g. 'TP4 PP8 VPP5 MB1 full', instead of the best.")
@click.option("--top", default=3, show_default=True, type=click.IntRange(min=1), help="How many of the best to show.")
@click.option("--hardware", type=click.Path(), help="YAML file of further accelerators.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    recipe: str | None,
    hf: str | None,
    gpus: str,
    seq_length: int | None,
    global_batch_size: int | None,
    fp8: bool,
    at: str | None,
    top: int,
    hardware: str | None,
    as_json: bool,
) -> None:
    """Estimate memory, communication and time of a run, and find the layouts that take the least time.

    Nothing is built or downloaded but, of a hub id, its config.json. Refuses what cannot run, or does not fit.
    """
    from megatron.bridge.training.planner.asking import question
    from megatron.bridge.training.planner.hardware import cluster
    from megatron.bridge.training.planner.layout import Layout
    from megatron.bridge.training.planner.plan import best, planned
    from megatron.bridge.training.planner.report import as_data, as_text

    asked = question(
        cluster(gpus, hardware),
        recipe=recipe,
        hf=hf,
        seq_length=seq_length,
        global_batch=global_batch_size,
        eight_bit=fp8,
    )
    plans = best(asked, top) if at is None else [planned(asked, Layout.parse(at))]
    click.echo(json.dumps(as_data(asked, plans), indent=2) if as_json else as_text(asked, plans))
