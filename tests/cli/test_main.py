"""The program ``metaopt``: what it lists, what it refuses, and that every command answers under its name."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import metaopt
from metaopt.cli.command import PROGRAMS, invoked
from metaopt.cli.main import COMMANDS, main

ROOT = Path(metaopt.__file__ or "").parent.parent


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_every_command_with_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: metaopt COMMAND") and err == ""
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    assert rows == {name: words for name, (_, words) in COMMANDS.items()}


def test_an_unknown_command_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adopt", "method=tent"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: adopt is no command; allowed are meta-train, adapt, ")


def test_every_command_has_its_name_its_module_and_its_script() -> None:
    assert {f"metaopt {name}" for name in COMMANDS} == set(PROGRAMS.values())
    modules = {module for module, _ in COMMANDS.values()}
    assert all(callable(import_module(module).main) for module in modules) and len(modules) == len(COMMANDS)
    scripts = {name for folder in ("adapt", "pretrain") for name in map(str, (ROOT / folder).glob("*.py"))}
    started = {
        module for module in modules for script in scripts if f"from {module} import main" in Path(script).read_text()
    }
    assert started == modules and len(scripts) == len(modules)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_to_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: metaopt {command} [--policy CKPT] [key=value ...]\n") and err == ""
    assert "Choices:" in out and "Settings (key=value, key.key=value):" in out and "  model:" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_bad_setting_in_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help", "+devise=1"]) == main([command, "+devise=1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == 2 * [err.splitlines()[0]]
    assert err.startswith("error: +devise is an unknown setting; did you mean device?")


def test_the_process_ends_with_the_commands_code() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "metaopt.cli.main", "adopt"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("started_as", "said"),
    [("/usr/bin/metaopt", ["metaopt", "adapt"]), ("adapt/online.py", ["python", "adapt/online.py"])],
)
def test_the_next_command_is_called_as_this_one_was(
    started_as: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started_as])
    assert invoked("adapt", "adapt/online.py") == said
