"""``resume=``: which arguments a run that goes on is composed of."""

from pathlib import Path
from typing import Any

import pytest

from metaopt.cli.compose import compose
from metaopt.cli.go_on import check_settings, plain, to_keep, with_those_of_the_run
from metaopt.cli.settings import OnlineSettings
from metaopt.errors import CheckpointError, ConfigError
from metaopt.online.snapshot import load_snapshot, save_snapshot

GIVEN = ["--policy", "a b.pt", "method.parts.class_balance=false", "out=x", "snapshot_every=5", "data.limit=3"]


def settings(*arguments: str) -> OnlineSettings:
    return compose(OnlineSettings, "online", arguments)


def kept(folder: Path, *arguments: str) -> dict[str, Any]:
    values = {"arguments": to_keep(arguments), "settings": plain(settings(*arguments))}
    save_snapshot(values, folder)
    return load_snapshot(folder)


def test_arguments_without_resume_stay_as_they_are() -> None:
    assert with_those_of_the_run(GIVEN) == GIVEN


@pytest.mark.parametrize("own", [[], GIVEN[:3], ["--policy=a b.pt"], ["snapshot_every=2"], ["data.limit=3"]])
def test_those_of_the_run_are_taken_over(tmp_path: Path, own: list[str]) -> None:
    saved = kept(tmp_path, *GIVEN)
    merged = with_those_of_the_run([f"resume={tmp_path}", *own])
    found = settings(*merged)
    assert (found.policy_path, found.resume, found.out) == ("a b.pt", str(tmp_path), str(tmp_path))
    assert found.method.parts["class_balance"] is False
    check_settings(found, saved["settings"])
    assert found.snapshot_every == (2 if own == ["snapshot_every=2"] else 5)


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ("data.limit=4", "data.limit=3"),
        ("device=auto", "device=cpu"),
        ("model=digits_vit", "model.name=cifar_resnet20"),
        ("method.parts.class_balance=true", "method.parts.class_balance"),
        ("--policy=b.pt", "policy_path=a b.pt"),
        ("method=bn", "method.name=policy"),
    ],
)
def test_what_contradicts_them_is_refused(tmp_path: Path, own: str, named: str) -> None:
    saved = kept(tmp_path, *GIVEN)
    with pytest.raises(ConfigError) as error:
        check_settings(settings(*with_those_of_the_run([own, f"resume={tmp_path}"])), saved["settings"])
    assert named.partition("=")[0] in str(error.value) and "\n" not in str(error.value)


def test_every_setting_of_a_run_is_compared() -> None:
    """A default that is another by now is noticed too."""
    now = settings("method=tent")
    then = plain(now)
    check_settings(now, then)
    for key in set(then) - {"resume", "out", "snapshot_every"}:
        with pytest.raises(ConfigError, match="goes on with the settings of its run"):
            check_settings(now, {**then, key: "other"})


def test_another_folder_is_refused(tmp_path: Path) -> None:
    kept(tmp_path, *GIVEN)
    with pytest.raises(ConfigError, match="out=elsewhere does not go with resume="):
        with_those_of_the_run(["out=elsewhere", f"resume={tmp_path}"])
    assert f"out={tmp_path}" in with_those_of_the_run([f"out={tmp_path}/.", f"resume={tmp_path}/snapshot.pt"])
    with pytest.raises(CheckpointError, match="to go on from"):
        with_those_of_the_run(["resume=nowhere"])
