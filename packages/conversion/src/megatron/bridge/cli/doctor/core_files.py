"""Proof of megatron-core that costs a fraction of its import: version in range, every file as it was released."""

import ast
import base64
import csv
import hashlib
from importlib.metadata import Distribution
from pathlib import Path

from packaging.version import InvalidVersion, Version

from megatron.bridge.cli.doctor.finding import Finding, Section, State
from megatron.bridge.cli.doctor.installed import installed, tested_range
from megatron.bridge.cli.doctor.packages import MEGATRON_CORE
from megatron.bridge.cli.locate import locate

NAME = MEGATRON_CORE.name


def examine_core() -> Finding:
    """The finding about megatron-core. Imports nothing of it."""
    spec = locate("megatron.core")
    if spec is None or spec.origin is None:
        return _finding(State.ABSENT, None, remedy=_install())
    root = Path(spec.origin).resolve().parent
    version = release(root)
    allowed = tested_range(NAME)
    if version is None or not allowed.contains(version, prereleases=True):
        reason = f"{version or 'an unknown version'} at {root} is outside the tested range {allowed}"
        return _finding(State.BROKEN, version, reason=reason, remedy=_install())
    distribution = installed().get(NAME)
    if distribution is None or Path(str(distribution.locate_file("megatron/core"))).resolve() != root:
        return _finding(State.WORKS, version, proof=f"version in range; a checkout at {root}, its files not verifiable")
    checked, faults = verify_files(distribution)
    if faults:
        reason = f"{len(faults)} of {checked} files are not as released, first {faults[0]}"
        return _finding(State.BROKEN, version, reason=reason, remedy=f"uv pip install --reinstall {NAME}=={version}")
    return _finding(State.WORKS, version, proof=f"{checked} files as released, version in {allowed}; --full imports it")


def _finding(
    state: State, version: str | None, *, proof: str | None = None, reason: str | None = None, remedy: str | None = None
) -> Finding:
    return Finding(
        section=Section.REQUIRED,
        name=NAME,
        state=state,
        required=True,
        version=version,
        proof=proof,
        reason=reason,
        purpose=MEGATRON_CORE.purpose,
        remedy=remedy,
    )


def _install() -> str:
    return f"uv pip install '{NAME}{tested_range(NAME)}'"


def release(root: Path) -> str | None:
    """The version that `package_info.py` in the folder of megatron.core states, or None."""
    try:
        tree = ast.parse((root / "package_info.py").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    values = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    parts = [str(values.get(part, "?")) for part in ("MAJOR", "MINOR", "PATCH")]
    try:
        return str(Version(".".join(parts) + str(values.get("PRE_RELEASE", ""))))
    except InvalidVersion:
        return None


def verify_files(distribution: Distribution) -> tuple[int, list[str]]:
    """Compare each file with the digest that the installer recorded.

    Returns:
        How many files were compared, and the faults in words.
    """
    # RECORD itself, because `distribution.files` leaves out files that are missing.
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    recorded = [(row[0], row[1]) for row in rows if len(row) == 3 and row[1]]
    verdicts = [_fault(Path(str(distribution.locate_file(file))), digest) for file, digest in recorded]
    faults = [f"{file}: {fault}" for (file, _), fault in zip(recorded, verdicts, strict=True) if fault]
    return len(recorded), faults


def _fault(file: Path, recorded: str) -> str | None:
    algorithm, _, expected = recorded.partition("=")
    try:
        digest = hashlib.new(algorithm, file.read_bytes()).digest()
    except OSError as error:
        return error.strerror
    same = base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == expected
    return None if same else "its content was changed"
