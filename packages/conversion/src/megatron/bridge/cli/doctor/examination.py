"""The whole examination: what is to be tried in guarded processes, and what the outcomes mean."""

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.bridge.cli.distributions import OURS
from megatron.bridge.cli.doctor import environment
from megatron.bridge.cli.doctor.core_files import examine_core
from megatron.bridge.cli.doctor.finding import Finding, Section, State
from megatron.bridge.cli.doctor.installed import installed, tested_range, version
from megatron.bridge.cli.doctor.packages import (
    KNOWN_FAILURES,
    MEGATRON_CORE,
    OPTIONAL,
    REQUIRED,
    TORCH,
    TRANSFORMER_ENGINE,
    Package,
)
from megatron.bridge.cli.locate import locate
from megatron.bridge.cli.offers import inspect_offers, list_offers, load_offers
from megatron.bridge.cli.probe import Outcome, import_step, platform_step, probe

PLATFORM = "platform"
DRIVER = Path("/proc/driver/nvidia/version")
type Outcomes = Mapping[str, Outcome]


def examine(*, full: bool, seconds: int, within: float) -> list[Finding]:
    """Look at everything.

    Args:
        full: import megatron.core and load every plugin, and ignore `within`.
        seconds: longest time for one import.
        within: seconds for all imports; optional packages that are not reached by then remain untried.
    """
    limits: dict[str, Any] = {"deadline": math.inf if full else time.time() + within, "seconds": seconds}
    with ThreadPoolExecutor(2) as pool:
        # Two processes at a time: one with torch already imported, one for what does without.
        with_torch = pool.submit(
            probe, _required_with_torch(full), if_time=_optional(torch=True), warm=["torch"], **limits
        )
        without = pool.submit(probe, _required_without_torch(), if_time=_optional(torch=False), **limits)
        whole = [*environment.examine_import_name(), *environment.examine_requirements()]
        core = examine_core()
        outcomes = {**without.result(), **with_torch.result()}
    listings = load_offers(list_offers(), seconds) if full else inspect_offers(list_offers())
    return [
        environment.examine_python(),
        *(_finding(package, Section.REQUIRED, outcomes) for package in REQUIRED),
        _with_import(core, outcomes),
        *(_of_ours(finding, outcomes) for finding in environment.examine_ours()),
        examine_cuda(outcomes.get(PLATFORM)),
        *whole,
        environment.examine_plugins(listings, loaded=full),
        *(_finding(package, Section.OPTIONAL, outcomes) for package in OPTIONAL),
    ]


def _present(package: Package) -> bool:
    return version(*package.distributions) is not None or locate(package.modules[0]) is not None


def _steps(packages: Sequence[Package], *, torch: bool) -> list[list[dict[str, Any]]]:
    tried = [package for package in packages if package.imports_torch is torch and _present(package)]
    return [[import_step(package.name, package.modules)] for package in tried]


def _required_with_torch(full: bool) -> list[list[dict[str, Any]]]:
    platform = [[platform_step(PLATFORM)]] if _present(TORCH) else []
    core = (MEGATRON_CORE,) if full else ()
    # Transformer Engine is optional, but when it is broken megatron-core may be, too: it is always tried.
    return [*platform, *_steps((*REQUIRED, TRANSFORMER_ENGINE, *core), torch=True)]


def _required_without_torch() -> list[list[dict[str, Any]]]:
    ours = [import_step(name, [OURS[name].module]) for name in OURS if name in installed()]
    return [ours, *_steps(REQUIRED, torch=False)]


def _optional(*, torch: bool) -> list[list[dict[str, Any]]]:
    others = (package for package in OPTIONAL if package is not TRANSFORMER_ENGINE)
    return _steps(sorted(others, key=lambda package: package.slow), torch=torch)


def _finding(package: Package, section: Section, outcomes: Outcomes) -> Finding:
    finding = Finding(
        section=section,
        name=package.name,
        state=State.ABSENT,
        required=section is Section.REQUIRED,
        version=version(*package.distributions),
        purpose=package.purpose,
        remedy=package.get,
    )
    if package.name not in outcomes and not _present(package):
        return finding
    if package.name not in outcomes:
        reason = "installed; there was no time to import it, --full does"
        return replace(finding, state=State.UNTRIED, reason=reason, remedy=None)
    allowed = tested_range(package.name)
    if finding.version is not None and not allowed.contains(finding.version, prereleases=True):
        reason = f"{finding.version} is outside the supported range {allowed}"
        return replace(finding, state=State.BROKEN, reason=reason, remedy=f"uv pip install '{package.name}{allowed}'")
    return _judged(finding, package, outcomes[package.name])


def _judged(finding: Finding, package: Package, outcome: Outcome) -> Finding:
    if outcome.reason is None:
        took = f" in {outcome.seconds:.0f} s" if outcome.seconds >= 1 else ""
        proof = f"imported {package.modules[-1]}{took}"
        return replace(finding, state=State.WORKS, proof=proof, remedy=None)
    return replace(
        finding, state=State.BROKEN, reason=outcome.reason, remedy=_remedy(package.name, outcome.reason) or package.get
    )


def _remedy(package: str, reason: str) -> str | None:
    return next(
        (
            known.remedy
            for known in KNOWN_FAILURES
            if known.package in (None, package) and re.search(known.pattern, reason)
        ),
        None,
    )


def _with_import(core: Finding, outcomes: Outcomes) -> Finding:
    """What is known about importing megatron.core, added to what its files say."""
    if core.state is not State.WORKS:
        return core
    imported = outcomes.get(MEGATRON_CORE.name)
    if imported is not None and imported.reason is None:
        return replace(core, proof=f"{(core.proof or '').partition(';')[0]}; imported")
    if imported is not None:
        return _judged(core, MEGATRON_CORE, imported)
    engine = outcomes.get(TRANSFORMER_ENGINE.name)
    if engine is not None and engine.reason is not None and not engine.tolerated:
        reason = f"import megatron.core fails with a Transformer Engine that is broken like this: {engine.reason}"
        return replace(
            core,
            state=State.BROKEN,
            proof=None,
            reason=reason,
            remedy=_remedy(TRANSFORMER_ENGINE.name, engine.reason) or "mend or uninstall transformer-engine",
        )
    return core


def _of_ours(finding: Finding, outcomes: Outcomes) -> Finding:
    outcome = outcomes.get(finding.name)
    if outcome is None:
        return finding
    if outcome.reason is None:
        return replace(finding, proof=f"imported {OURS[finding.name].module}")
    remedy = f"uv pip install --reinstall {finding.name}"
    return replace(finding, state=State.BROKEN, required=True, reason=outcome.reason, remedy=remedy)


def examine_cuda(outcome: Outcome | None) -> Finding:
    """The finding about CUDA, from `megatron.bridge.platform.describe()` (None: it could not be asked)."""
    finding = Finding(
        section=Section.ENVIRONMENT,
        name="CUDA",
        state=State.ABSENT,
        purpose="speed: everything also runs on CPU with gloo",
        remedy="a machine with an NVIDIA GPU and its driver",
    )
    if outcome is None:
        return replace(finding, reason="torch is absent")
    if outcome.reason is not None:
        return replace(finding, state=State.BROKEN, reason=outcome.reason)
    facts = outcome.value
    if facts["cuda_available"]:
        devices = ", ".join(f"{each['name']} {each['memory'] / 2**30:.0f} GiB" for each in facts["cuda_devices"])
        proof = f"{devices}; driver for CUDA {facts['cuda_driver']}"
        return replace(finding, state=State.WORKS, version=facts["cuda_runtime"], proof=proof, remedy=None)
    return _without_device(finding, facts["cuda_runtime"])


def _without_device(finding: Finding, runtime: str | None) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip(" -1"):
        return replace(
            finding, reason=f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", remedy="unset CUDA_VISIBLE_DEVICES"
        )
    if not DRIVER.exists():
        return finding
    built = f"built for CUDA {runtime}" if runtime else "built without CUDA"
    return replace(
        finding,
        state=State.BROKEN,
        reason=f"an NVIDIA driver is loaded, but torch ({built}) sees no device",
        remedy="start the container with its GPUs, or get a torch for this driver: "
        "uv pip install --reinstall torch --torch-backend=auto",
    )
