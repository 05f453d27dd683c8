"""The command line's root and `plugins`, with plugins of every sort installed beside ours."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.bridge.cli.root import run
from megatron.bridge.registry import refresh

COMMANDS = "megatron.bridge.commands"
MAIN = "import sys; from megatron.bridge.cli.root import main; main()"
type Install = Callable[..., Path]


def command(body: str, options: str = "") -> str:
    """Source of a module with a click command `it` whose function has this body."""
    return (
        "import click, sys\nfrom megatron.bridge.errors import BridgeError\n"
        f"@click.command()\n{options}\ndef it():\n    '''Do it.'''\n    {body}\n"
    )


def megatron_bridge(*args: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site or "")}
    return subprocess.run(
        [sys.executable, "-P", "-c", MAIN, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_lists_each_command_with_its_line_and_foreign_origin(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", f"[{COMMANDS}]\nfrob = cmd_frob:it\n", "2.0", cmd_frob=command("pass"))
    assert run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["frob", "Do", "it.", "[acme", "2.0]"] for line in lines)
    assert any(line.startswith("  plugins") and line.endswith("version.") for line in lines), "ours without origin"


def test_a_broken_command_is_listed_as_broken_and_spoils_no_other(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("bad", f"[{COMMANDS}]\nbroken = cmd_broken:it\n", cmd_broken="import nothing_like_this")
    install("odd", f"[{COMMANDS}]\nodd = cmd_odd:it\n", cmd_odd="it = 3")
    install("acme", f"[{COMMANDS}]\nfrob = cmd_frob:it\n", cmd_frob=command("print('frobbed')"))
    assert run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "broken BROKEN: command 'broken' of bad 1.0" in text
    assert "No module named 'nothing_like_this'" in text
    assert "odd BROKEN: command 'odd' of odd 1.0 has the wrong kind: it must be a click command or group" in text
    assert run(["frob"]) == 0
    assert capsys.readouterr().out == "frobbed\n"
    assert run(["broken"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: command 'broken' of bad 1.0")


def test_a_command_offered_twice_is_refused_when_used(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", f"[{COMMANDS}]\nfrob = cmd_frob:it\n", cmd_frob=command("pass"))
    install("zeta", f"[{COMMANDS}]\nfrob = cmd_frob:it\n")
    assert run(["--help"]) == 0
    assert run(["frob"]) == 1
    assert "offered by acme 1.0 (cmd_frob:it) and zeta 1.0 (cmd_frob:it)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("pass", 0),
        ("return 7", 0),
        ("raise BridgeError('no such shard')", 1),
        ("raise click.Abort()", 1),
        ("raise click.UsageError('not so')", 2),
        ("raise KeyboardInterrupt", 130),
        ("click.get_current_context().exit(3)", 3),
    ],
)
def test_exit_codes(install: Install, body: str, code: int) -> None:
    install("acme", f"[{COMMANDS}]\nfrob = cmd_frob:it\n", cmd_frob=command(body))
    assert run(["frob"]) == code


def test_a_refusal_has_no_traceback_unless_debug_is_given(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", f"[{COMMANDS}]\nfrob = cmd_frob:it\n", cmd_frob=command("raise BridgeError('no such shard')"))
    assert run(["frob"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: no such shard\n")
    assert run(["--debug", "frob"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_other_errors_are_not_swallowed(install: Install) -> None:
    install("acme", f"[{COMMANDS}]\nfrob = cmd_frob:it\n", cmd_frob=command("raise ZeroDivisionError"))
    with pytest.raises(ZeroDivisionError):
        run(["frob"])


def test_an_unknown_command_gives_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugin"]) == 2
    assert "no command is called 'plugin'; did you mean 'plugins'" in capsys.readouterr().err


def test_a_command_that_is_not_installed_says_what_to_install(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(site)])
    refresh()
    assert run(["train"]) == 2
    assert "it comes with the package 'megatron-bridge-training'" in capsys.readouterr().err


def test_completion_survives_a_broken_command(install: Install, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("bad", f"[{COMMANDS}]\nplug-bad = cmd_broken:it\n", cmd_broken="import nothing_like_this")
    monkeypatch.setenv("_MEGATRON_BRIDGE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "megatron-bridge plug")
    monkeypatch.setenv("COMP_CWORD", "1")
    completed = megatron_bridge(site=site)
    assert (completed.stdout, completed.stderr) == ("plain,plugins\n", "")


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["plugins"], ["plugins", "--json"]])
def test_light_commands_are_fast_and_import_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from megatron.bridge.cli.root import run; code = run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'megatron.core'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    times = []
    for _ in range(3):
        before = _children_seconds()
        subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True)
        times.append(_children_seconds() - before)
    assert min(times) < 0.5, "seconds of CPU"


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_version_is_the_distribution_s(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert run(["--version"]) == 0
    assert capsys.readouterr().out.split()[-1] == version("megatron-bridge-conversion")


def test_a_closed_pipe_is_no_error() -> None:
    script = f"{sys.executable} -c {MAIN!r} plugins --json | head -c 1".replace("'", '"')
    completed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (completed.stdout, completed.stderr) == ("[", "")


def test_plugins_lists_every_offer_without_importing(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    points = "[megatron.bridge.test_cli]\nbomb = cmd_bomb:it\n"
    install("acme", points, "3.0", cmd_bomb="raise SystemExit('imported')")
    assert run(["plugins", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    bomb = next(each for each in listed if each["name"] == "bomb")
    assert bomb == {
        "group": "megatron.bridge.test_cli",
        "name": "bomb",
        "target": "cmd_bomb:it",
        "distribution": "acme",
        "version": "3.0",
        "state": "listed",
        "reason": None,
    }
    assert {"doctor", "plugins"} <= {each["name"] for each in listed if each["group"] == COMMANDS}
    assert "cmd_bomb" not in sys.modules


def test_plugins_flags_a_conflict_on_both_sides(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", "[megatron.bridge.test_cli]\nframe = a:b\n")
    install("zeta", "[megatron.bridge.test_cli]\nframe = c:d\nother = c:d\n", "9")
    assert run(["plugins", "--group", "test_cli"]) == 0
    text = capsys.readouterr().out
    assert text.count("CONFLICT") == 2
    assert "'frame' is also offered by acme 1.0 (a:b); uninstall one" in text
    assert "'frame' is also offered by zeta 9 (c:d); uninstall one" in text
    assert "3 offers in 1 groups, 2 in conflict" in text


def test_plugins_check_tells_what_is_broken_and_goes_on(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a_good", "b_missing", "c_crash", "d_exit", "e_hang", "f_good"]
    points = "[megatron.bridge.test_cli]\n" + "".join(f"{name} = cmd_{name}:it\n" for name in names)
    install(
        "acme",
        points,
        cmd_a_good="print('noise on stdout')\nit = 1",
        cmd_b_missing="import nothing_like_this",
        cmd_c_crash="import os, signal\nprint('last words', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)",
        cmd_d_exit="import os\nos._exit(5)",
        cmd_e_hang="import time\ntime.sleep(60)",
        cmd_f_good="it = 2",
    )
    assert run(["plugins", "--group", "test_cli", "--check", "--timeout", "1", "--json"]) == 1
    reasons = {each["name"]: each["reason"] for each in json.loads(capsys.readouterr().out)}
    assert reasons["a_good"] is None
    assert "plugin 'b_missing' of acme 1.0" in reasons["b_missing"]
    assert reasons["c_crash"] == "crashed with SIGSEGV; its last line was 'last words'"
    assert reasons["d_exit"] == "ended the process with exit code 5"
    assert reasons["e_hang"] == "did not finish within 1 s"
    assert reasons["f_good"] is None


def test_plugins_check_sees_a_wrong_kind_where_a_registry_is_declared(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", f"[{COMMANDS}]\nodd = cmd_odd:it\n", cmd_odd="it = 3")
    assert run(["plugins", "--group", COMMANDS, "--check", "--json"]) == 1
    states = {each["name"]: each["state"] for each in json.loads(capsys.readouterr().out)}
    assert states["odd"] == "broken"
    assert states["plugins"] == states["doctor"] == "works"


def test_plugins_of_an_unknown_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "--group", "megatron.bridge.comands"]) == 1
    assert "did you mean 'megatron.bridge.commands'" in capsys.readouterr().err
    assert run(["plugins", "--group", "commands"]) == 0
