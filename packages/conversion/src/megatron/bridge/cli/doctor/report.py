"""The doctor's report: a table for people, JSON for scripts."""

import json
import sys
from collections.abc import Sequence

from megatron.bridge.cli.doctor.finding import Finding, Section, State, healthy

WIDTH_WITHOUT_TERMINAL = 120
_STYLES = {State.WORKS: "green", State.ABSENT: "dim", State.BROKEN: "bold red", State.UNTRIED: "yellow"}


def as_json(findings: Sequence[Finding]) -> str:
    """`{"healthy": bool, "findings": [...]}`."""
    return json.dumps({"healthy": healthy(findings), "findings": [each.as_dict() for each in findings]}, indent=2)


def print_table(findings: Sequence[Finding], seconds: float) -> None:
    """Print every finding by section, then the verdict."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
    table = Table(box=None, pad_edge=False, show_header=False)
    for fold in (False, False, False, True):
        table.add_column(overflow="fold", no_wrap=not fold, ratio=1 if fold else None)
    for section in Section:
        table.add_row(Text(section.value, style="bold underline"))
        for each in (finding for finding in findings if finding.section is section):
            style = _STYLES[each.state]
            table.add_row(
                Text(f"  {each.name}"), Text(each.version or ""), Text(each.state, style=style), Text(_details(each))
            )
    console.print(table)
    console.print(Text(_verdict(findings, seconds), style="bold"))


def _details(finding: Finding) -> str:
    if finding.state is State.WORKS:
        return "; ".join(filter(None, (finding.proof, finding.purpose)))
    lines = [finding.reason or finding.purpose or "", f"-> {finding.remedy}" if finding.remedy else ""]
    return "\n".join(filter(None, lines))


def _verdict(findings: Sequence[Finding], seconds: float) -> str:
    bad = [finding.name for finding in findings if finding.required and finding.state is not State.WORKS]
    other = [finding.name for finding in findings if not finding.required and finding.state is State.BROKEN]
    also = f"; broken, but not needed: {', '.join(other)}" if other else ""
    head = f"NOT HEALTHY, needed and not working: {', '.join(bad)}" if bad else "healthy: everything required works"
    return f"{head}{also} ({seconds:.1f} s)"
