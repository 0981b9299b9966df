"""What every command does around its work: settings, help, one line for an error, an exit code, a device."""

import pytest
import torch

from metaopt.cli.command import resolve_device, run_command
from metaopt.cli.settings import OnlineSettings
from metaopt.errors import ConfigError, DataError


def test_run_command_hands_over_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    received: list[OnlineSettings] = []
    assert run_command(received.append, OnlineSettings, "online", ["method=tent", "seed=4"]) == 0
    assert [(config.method.name, config.seed) for config in received] == [("tent", 4)]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("images hold NaN;\nallowed are numbers"), 2, "error: images hold NaN; allowed are numbers\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str) -> None:
    def main(config: OnlineSettings) -> None:
        raise error

    assert run_command(main, OnlineSettings, "online", ["method=bn"]) == code
    assert capsys.readouterr() == ("", line)


def test_a_bad_setting_exits_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda _: pytest.fail("ran"), OnlineSettings, "online", ["+sede=1"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: +sede is an unknown setting; did you mean seed?")


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    def main(config: OnlineSettings) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main, OnlineSettings, "online", ["method=bn"])


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_prints_the_settings_with_the_arguments_applied(capsys: pytest.CaptureFixture[str], option: str) -> None:
    argv = ["seed=17", option, "--policy", "p.pt"]
    assert run_command(lambda _: pytest.fail("ran"), OnlineSettings, "online", argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: metaopt adapt [--policy CKPT] [key=value ...]")
    assert all(part in out for part in ("seed: 17", "policy_path: p.pt", "arrays, cifar_c, digits", "or any timm name"))


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert isinstance(resolve_device("auto"), torch.device)
    for name in ("gpu9", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device={name} cannot be used here"):
            resolve_device(name)
