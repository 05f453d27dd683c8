"""Findings about the environment as a whole: Python, who owns the import name, versions that do not suit, plugins."""

import platform
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.specifiers import SpecifierSet

from megatron.bridge.cli.distributions import OURS
from megatron.bridge.cli.doctor.finding import Finding, Section, State
from megatron.bridge.cli.doctor.installed import OUR_BASE, installed
from megatron.bridge.cli.doctor.requirements import Unmet, advice, check_requirements
from megatron.bridge.cli.offers import Listing

NVIDIA = "megatron-bridge"
BRIDGE_FILE = "megatron/bridge/__init__.py"
NAMESPACE_FILE = "megatron/__init__.py"


def examine_python() -> Finding:
    """Python itself, against what megatron-bridge-conversion declares."""
    ours = installed().get(OUR_BASE)
    declared = SpecifierSet((ours.metadata["Requires-Python"] or "") if ours else "")
    works = declared.contains(platform.python_version(), prereleases=True)
    return Finding(
        section=Section.REQUIRED,
        name="python",
        state=State.WORKS if works else State.BROKEN,
        required=True,
        version=platform.python_version(),
        proof=f"runs this, version in {declared}" if works else None,
        reason=None if works else f"outside the supported range {declared}",
        remedy=None if works else "uv python install 3.12",
    )


def examine_ours() -> list[Finding]:
    """Our distributions by metadata; that they import is proven elsewhere."""
    findings = []
    for name, ours in OURS.items():
        present = name in installed()
        base = name == OUR_BASE
        findings.append(
            Finding(
                section=Section.OURS,
                name=name,
                state=State.WORKS if present else State.ABSENT,
                required=base,
                version=installed()[name].version if present else None,
                purpose=ours.purpose,
                reason="imported from a folder without being installed, so that no plugin is found"
                if base and not present
                else None,
                remedy=None if present else f"uv pip install {name}",
            )
        )
    return findings


def _verdict(name: str, faults: Iterable[str], *, proof: str, remedy: str, required: bool = True) -> Finding:
    reason = "; ".join(faults)
    return Finding(
        section=Section.ENVIRONMENT,
        name=name,
        state=State.BROKEN if reason else State.WORKS,
        required=required,
        proof=None if reason else proof,
        reason=reason or None,
        remedy=remedy if reason else None,
    )


def examine_import_name() -> list[Finding]:
    """Whether `megatron.bridge` is ours alone, and `megatron` a namespace."""
    nvidia = installed().get(NVIDIA)
    faults = [f"NVIDIA's distribution {NVIDIA} {nvidia.version} owns the same import name"] if nvidia else []
    owners = _shipping(BRIDGE_FILE)
    if len(owners) > 1:
        faults.append(f"{BRIDGE_FILE} comes from {' and '.join(owners)}")
    reinstall = f"uv pip install --reinstall {OUR_BASE}"
    undo = f"uv pip uninstall {NVIDIA}, then {reinstall}" if nvidia else f"keep one of them, then {reinstall}"
    shadows = [f"{owner} makes `megatron` a plain package and hides the others" for owner in _shipping(NAMESPACE_FILE)]
    return [
        _verdict("megatron.bridge", faults, proof="one owner", remedy=f"{undo} (uninstalling removes shared files)"),
        _verdict("megatron namespace", shadows, proof="no megatron/__init__.py on the path", remedy="remove that file"),
    ]


def _shipping(file: str) -> list[str]:
    """Everything that ships `file`: distributions by their records, and folders on the path."""
    line = f"\n{file},"
    owning = [each for each in installed().values() if line in "\n" + (each.read_text("RECORD") or "")]
    known = {Path(str(each.locate_file(file))).resolve() for each in owning}
    on_path = {(Path(entry or ".") / file).resolve() for entry in sys.path}
    unowned = sorted(str(path) for path in on_path - known if path.is_file())  # editable installs and checkouts
    return [f"{each.name} {each.version}" for each in owning] + unowned


def examine_requirements() -> list[Finding]:
    """Whether the installed versions suit our distributions, and the other distributions."""
    ours = check_requirements([name for name in OURS if name in installed()])
    others = check_requirements([name for name in installed() if name not in ours.seen], follow=False)
    return [
        _verdict(
            "requirements of ours",
            map(str, ours.unmet),
            proof=f"met in {len(ours.seen)} distributions",
            remedy=_advice(ours.unmet),
        ),
        _verdict(
            "other requirements",
            map(str, others.unmet),
            proof=f"met in {len(others.seen)} distributions",
            remedy=_advice(others.unmet),
            required=False,
        ),
    ]


def _advice(unmet: Iterable[Unmet]) -> str:
    return "; ".join(dict.fromkeys(map(advice, unmet)))


def examine_plugins(listings: list[Listing], *, loaded: bool) -> Finding:
    """One verdict on all plugins; those of our own distributions are required."""
    bad = [each for each in listings if each.state in ("broken", "conflict")]
    how = "loaded" if loaded else "found, not loaded (--full loads them)"
    return _verdict(
        "plugins",
        [f"{each.offer.name!r} of {each.offer.origin} ({each.group}): {each.reason}" for each in bad],
        proof=f"{len(listings)} {how}",
        remedy="megatron-bridge plugins --check; repair or uninstall the distribution named",
        required=any(each.offer.distribution in OURS for each in bad) or not bad,
    )
