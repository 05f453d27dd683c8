"""The command `megatron-bridge doctor`."""

import time

import click


@click.command()
@click.option("--full", is_flag=True, help="Import megatron.core and all packages, load every plugin.")
@click.option("--timeout", default=60, show_default=True, type=click.IntRange(1), help="Seconds for one import.")
@click.option(
    "--within",
    default=7.5,  # with what surrounds the imports, the report then takes less than ten
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds for all imports; optional packages not reached by then stay untried.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(ctx: click.Context, full: bool, timeout: int, within: float, as_json: bool) -> None:
    """Report what works here, what does not and why, and how to get it.

    Exits with 1 when something that is required does not work.
    """
    from megatron.bridge.cli.doctor import report
    from megatron.bridge.cli.doctor.examination import examine
    from megatron.bridge.cli.doctor.finding import healthy

    begin = time.perf_counter()
    findings = examine(full=full, seconds=timeout, within=within)
    if as_json:
        click.echo(report.as_json(findings))
    else:
        report.print_table(findings, time.perf_counter() - begin)
    if not healthy(findings):
        ctx.exit(1)
