"""The doctor against healthy, half-installed and contradictory environments."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from megatron.bridge.cli.doctor import environment, examination, installed, requirements
from megatron.bridge.cli.doctor.core_files import examine_core, release, verify_files
from megatron.bridge.cli.doctor.finding import Finding, State
from megatron.bridge.cli.offers import inspect_offers, list_offers
from megatron.bridge.cli.probe import Outcome, import_step, probe

type Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def fresh_metadata() -> Iterator[None]:
    installed.installed.cache_clear()
    yield
    installed.installed.cache_clear()


def only(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide everything but the distributions in `site`."""
    monkeypatch.setattr(sys, "path", [str(site)])
    installed.installed.cache_clear()


# -- the guarded process ------------------------------------------------------------------------------------------


def test_each_way_to_fail_is_named_and_the_others_go_on(install: Install) -> None:
    install(
        "acme",
        **{
            "probed_good": "print('noise')",
            "probed_missing": "import nothing_like_this",
            "probed_crash": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
            "probed_exit": "print('bye')\nimport os\nos._exit(5)",
            "probed_quit": "raise SystemExit('quit')",
            "probed_hang": "import time\ntime.sleep(60)",
        },
    )
    names = ["probed_crash", "probed_exit", "probed_quit", "probed_hang", "probed_missing", "probed_good"]
    apart = probe([[import_step(name, [name])] for name in names], seconds=1)
    together = probe([[import_step(name, [name]) for name in names]], seconds=1)
    for outcomes in (apart, together):
        assert {name: outcome.reason for name, outcome in outcomes.items()} == {
            "probed_good": None,
            "probed_missing": "ModuleNotFoundError: No module named 'nothing_like_this'",
            "probed_crash": "crashed with SIGSEGV",
            "probed_exit": "ended the process with exit code 5; its last line was 'bye'",
            "probed_quit": "SystemExit: quit",
            "probed_hang": "did not finish within 1 s",
        }
        assert outcomes["probed_missing"].tolerated
        assert not outcomes["probed_quit"].tolerated


def test_batches_do_not_see_each_other_but_share_what_is_warm(install: Install) -> None:
    install("acme", probed_warm="STATE = []", probed_patch="import probed_warm\nprobed_warm.STATE.append(1)")
    install("beta", probed_look="import probed_warm\nassert not probed_warm.STATE, 'patched'")
    steps = [import_step("patch", ["probed_patch"]), import_step("look", ["probed_look"])]
    apart = probe([[step] for step in steps], warm=["probed_warm"])
    together = probe([steps], warm=["probed_warm"])
    assert (apart["patch"].reason, apart["look"].reason) == (None, None)
    assert together["look"].reason == "AssertionError: patched"


def test_a_warm_module_that_crashes_is_named(install: Install) -> None:
    install("acme", probed_crash="import os\nos.abort()", probed_good="")
    reason = probe([[import_step("good", ["probed_good"])]], warm=["probed_crash"])["good"].reason
    assert reason == "the probing process crashed with SIGABRT while importing probed_crash"


def test_a_deadline_leaves_out_what_is_not_needed_and_nothing_else(install: Install) -> None:
    install("acme", probed_slow="import time\ntime.sleep(1)", probed_hang="import time\ntime.sleep(60)")
    begin = time.time()
    outcomes = probe(
        [[import_step("needed", ["probed_slow"])]],
        if_time=[[import_step("quick", ["json"])], [import_step("hang", ["probed_hang"])], [import_step("x", ["x"])]],
        deadline=begin + 5,
    )
    assert outcomes.keys() == {"needed", "quick"}
    assert time.time() - begin < 20
    late = probe([[import_step("needed", ["json"])]], if_time=[[import_step("late", ["json"])]], deadline=begin)
    assert late.keys() == {"needed"}


# -- requirements -------------------------------------------------------------------------------------------------


def test_the_fsspec_contradiction_names_both_sides(
    install: Install, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(site, monkeypatch)
    install("megatron-energon", version="7.0", requires=("fsspec>=2026.1.0",))
    install("datasets", version="4.0", requires=("fsspec[http]<=2025.9.0,>=2023.1.0",))
    install("fsspec", version="2026.2.0")
    finding = next(each for each in environment.examine_requirements() if each.name == "other requirements")
    assert finding.state is State.BROKEN
    assert not finding.required, "it does not stop the work"
    assert finding.reason == "datasets 4.0 needs fsspec<=2025.9.0,>=2023.1.0, but 2026.2.0 is installed"
    assert finding.remedy is not None
    assert finding.remedy.startswith("no version of fsspec suits all of datasets (<=2025.9.0,>=2023.1.0), megatron-en")


def test_a_lack_of_ours_is_required_and_followed_through_extras(
    install: Install, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(site, monkeypatch)
    install("megatron-bridge-peft", requires=("engine[fast]>=2", "windows-only; sys_platform == 'win32'"))
    install("engine", version="2.1", requires=("turbo>=3; extra == 'fast'", "absent; extra == 'slow'"))
    install("turbo", version="2.0")
    ours, others = environment.examine_requirements()
    assert (ours.state, ours.required, others.state) == (State.BROKEN, True, State.WORKS)
    assert ours.reason == "engine 2.1 needs turbo>=3, but 2.0 is installed"
    assert ours.remedy == "uv pip install 'turbo>=3'"


def test_what_is_installed_here_agrees_with_uv() -> None:
    if shutil.which("uv") is None:
        pytest.skip("needs uv to compare with")
    command = ["uv", "pip", "check", "--python", sys.executable]
    uv = subprocess.run(command, capture_output=True, text=True, check=False)
    check = requirements.check_requirements(list(installed.installed()), follow=False)
    assert (not check.unmet) == (uv.returncode == 0), uv.stderr


@pytest.mark.parametrize(
    ("specifiers", "answer"),
    [
        ("", True),
        (">=1,<2", True),
        (">1,<1.5", True),
        ("<1", True),
        ("==1.*,>=1.4", True),
        (">=2026.1.0,<=2025.9.0", False),
        (">2,<2", False),
        ("==1.0,!=1.0", False),
    ],
)
def test_satisfiable(specifiers: str, answer: bool) -> None:
    assert requirements.satisfiable(SpecifierSet(specifiers)) is answer


# -- who owns the import name -------------------------------------------------------------------------------------


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_this_installation_has_one_owner() -> None:
    assert {each.state for each in environment.examine_import_name()} == {State.WORKS}


def test_nvidia_beside_us_is_seen(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = tmp_path / "later"
    monkeypatch.setattr(sys, "path", [*sys.path, str(later)])
    install("megatron-bridge", "", "0.6.2", later, (), **{"megatron/bridge/__init__.py": ""})
    installed.installed.cache_clear()
    finding = by_name(environment.examine_import_name())["megatron.bridge"]
    assert (finding.state, finding.required) == (State.BROKEN, True)
    assert finding.reason is not None
    assert finding.remedy is not None
    assert "NVIDIA's distribution megatron-bridge 0.6.2 owns the same import name" in finding.reason
    assert "megatron/bridge/__init__.py comes from megatron-bridge 0.6.2 and " in finding.reason
    assert "uv pip uninstall megatron-bridge, then uv pip install --reinstall" in finding.remedy


def test_a_plain_megatron_package_is_seen(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "megatron").mkdir(parents=True)
    (checkout / "megatron" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(checkout)])
    finding = by_name(environment.examine_import_name())["megatron namespace"]
    assert finding.state is State.BROKEN
    assert str(checkout) in (finding.reason or "")


# -- megatron-core by its files -----------------------------------------------------------------------------------


def test_the_installed_core_is_as_released() -> None:
    import importlib.metadata

    finding = examine_core()
    assert finding.state is State.WORKS, finding.reason
    assert finding.version == importlib.metadata.version("megatron-core")
    assert "megatron.core" not in sys.modules or "files as released" in (finding.proof or "")


def test_changed_and_missing_files_are_named(install: Install, site: Path) -> None:
    info = install("engine", "", "1.0", site, (), **{"engine/a.py": "a = 1", "engine/b.py": "b", "engine/c.py": "c"})
    (site / "engine" / "a.py").write_text("a = 2")
    (site / "engine" / "b.py").unlink()
    distribution = installed.installed()["engine"]
    assert info.exists()
    assert verify_files(distribution) == (
        3,
        ["engine/a.py: its content was changed", "engine/b.py: No such file or directory"],
    )


def test_the_version_is_read_from_the_folder_that_is_imported(tmp_path: Path) -> None:
    (tmp_path / "package_info.py").write_text("MAJOR = 0\nMINOR = 20\nPATCH = 1\nPRE_RELEASE = 'rc2'\n")
    assert release(tmp_path) == "0.20.1rc2"
    (tmp_path / "package_info.py").write_text("MAJOR = 0\n")
    assert release(tmp_path) is None
    assert release(tmp_path / "nowhere") is None


# -- plugins, looked up without running them ----------------------------------------------------------------------


def test_inspection_runs_nothing_and_finds_what_is_missing(install: Install) -> None:
    points = {
        "ok": "looked_up:It",
        "imported": "looked_up:path",
        "nested": "looked_up:It.method",
        "whole": "looked_up",
        "typo": "looked_up:Itt",
        "nowhere": "looked_up.deeper:It",
        "syntax": "looked_broken:It",
        "shape": "not a target",
    }
    source = "from os import path\nclass It:\n    def method(self): ...\nraise SystemExit('was run')\n"
    lines = "\n".join(f"{name} = {target}" for name, target in points.items())
    install("acme", f"[megatron.bridge.test_doctor]\n{lines}\n", looked_up=source, looked_broken="def (:")
    reasons = {each.offer.name: each.reason for each in inspect_offers(list_offers("test_doctor"))}
    assert {name for name, reason in reasons.items() if reason is None} == {"ok", "imported", "nested", "whole"}
    assert reasons["typo"] == "the module 'looked_up' binds no 'Itt'; did you mean 'It'?"
    assert reasons["nowhere"] == "there is no module 'looked_up.deeper'"
    assert (reasons["syntax"] or "").startswith("SyntaxError")
    assert "not of the form module:attribute" in (reasons["shape"] or "")
    assert "looked_up" not in sys.modules


# -- CUDA ---------------------------------------------------------------------------------------------------------


def test_cuda_present_absent_hidden_and_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = {"name": "NVIDIA H200", "memory": 139 * 2**30, "capability": "9.0"}
    facts = {"cuda_available": True, "cuda_runtime": "13.0", "cuda_devices": [device] * 2, "cuda_driver": "13.1"}
    none = {"cuda_available": False, "cuda_runtime": "13.0", "cuda_devices": [], "cuda_driver": None}
    works = examination.examine_cuda(Outcome(value=facts))
    assert (works.state, works.version) == (State.WORKS, "13.0")
    assert works.proof == "NVIDIA H200 139 GiB, NVIDIA H200 139 GiB; driver for CUDA 13.1"

    monkeypatch.setattr(examination, "DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    absent = examination.examine_cuda(Outcome(value=none))
    assert (absent.state, absent.required, absent.reason) == (State.ABSENT, False, None)
    (tmp_path / "version").touch()
    broken = examination.examine_cuda(Outcome(value=none))
    assert broken.state is State.BROKEN
    assert "torch (built for CUDA 13.0) sees no device" in (broken.reason or "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert examination.examine_cuda(Outcome(value=none)).reason == "hidden by CUDA_VISIBLE_DEVICES='-1'"
    assert examination.examine_cuda(Outcome(reason="RuntimeError: no")).state is State.BROKEN
    assert examination.examine_cuda(None).reason == "torch is absent"


# -- the command --------------------------------------------------------------------------------------------------


def doctor(*args: str, site: Path | None = None) -> tuple[int, str]:
    main = "from megatron.bridge.cli.root import main; main()"
    completed = subprocess.run(
        [sys.executable, "-P", "-c", main, "doctor", *args],
        check=False,
        env={**os.environ, "PYTHONPATH": str(site or "")},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return completed.returncode, completed.stdout


def test_a_healthy_installation() -> None:
    code, text = doctor("--json")
    report = json.loads(text)
    found = {each["name"]: each for each in report["findings"]}
    assert (code, report["healthy"]) == (0, True), [each for each in report["findings"] if each["state"] == "broken"]
    for name in ("python", "torch", "triton", "transformers", "safetensors", "megatron-core"):
        assert found[name]["state"] == "works"
        assert found[name]["version"]
        assert found[name]["proof"]
    for finding in report["findings"]:
        assert finding["state"] != "absent" or (finding["purpose"] and finding["remedy"]), finding


def test_broken_packages_are_told_apart_and_do_no_harm(install: Install, site: Path) -> None:
    engine = {
        "transformer_engine/__init__.py": "",
        "transformer_engine/pytorch/__init__.py": "raise FileNotFoundError('Could not find shared object file')",
    }
    install("transformer-engine", version="2.20", **engine)
    # The module was removed from torch, so the message is torch's own.
    install("nvidia-modelopt", version="0.20", **{"modelopt/torch.py": "from torch.onnx import _type_utils"})
    install("flash-attn", version="2.0", flash_attn="import os\nos.abort()")
    install("apex", version="0.9.10.dev0", **{"apex/__init__.py": "import pyramid.session"})
    install("acme", "[megatron.bridge.peft]\nlora2 = acme_nowhere:Lora\n", version="4.0")
    code, text = doctor("--json", "--within", "60", site=site)
    found = {each["name"]: each for each in json.loads(text)["findings"]}
    broken = {name: each for name, each in found.items() if each["state"] == "broken"}
    assert code == 1, "with Transformer Engine like this, import megatron.core fails"
    assert broken.keys() == {
        "megatron-core",
        "transformer-engine",
        "nvidia-modelopt",
        "flash-attn",
        "apex",
        "plugins",
    }
    assert "Could not find shared object file" in broken["megatron-core"]["reason"]
    assert "half installed" in broken["transformer-engine"]["remedy"]
    assert "cannot import name '_type_utils'" in broken["nvidia-modelopt"]["reason"]
    assert "older than your torch" in broken["nvidia-modelopt"]["remedy"]
    assert broken["flash-attn"]["reason"].startswith("crashed with SIGABRT")
    assert "unrelated" in broken["apex"]["remedy"]
    assert "'lora2' of acme 4.0" in broken["plugins"]["reason"]
    assert not broken["plugins"]["required"]
    assert found["torch"]["state"] == "works"


def test_the_table_shows_every_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.bridge.cli.doctor.finding import Section
    from megatron.bridge.cli.doctor.report import print_table

    facts: dict[str, Any] = {"section": Section.REQUIRED, "required": True}
    findings = [
        Finding(name="torch", state=State.WORKS, version="2.13.0", proof="imported torch", **facts),
        Finding(name="triton", state=State.BROKEN, reason="[no] such lib", remedy="mend [it]", **facts),
        Finding(section=Section.OPTIONAL, name="timm", state=State.ABSENT, purpose="vision", remedy="get timm"),
    ]
    print_table(findings, 1.25)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "torch 2.13.0 works imported torch" in lines
    assert "triton broken [no] such lib" in lines
    assert "-> mend [it]" in lines
    assert "timm absent vision" in lines
    assert lines[-1] == "NOT HEALTHY, needed and not working: triton (1.2 s)"
