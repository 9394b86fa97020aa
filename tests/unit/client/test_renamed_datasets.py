"""Names of data sets that changed: the former ones still work and warn, and what is stored under a key stays under it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from touchline import datasets
from touchline.datasets import ColumnTransforms
from touchline.datasets.loader import sender_of
from touchline.datasets.source import Digest


class FixedSource:
    """A source whose content never changes."""

    format = "npz"
    size_bytes = 7

    def fingerprint(self, digest: Digest) -> None:
        digest.add(b"content")


@pytest.mark.parametrize(
    ("transforms", "reload_label", "sender"),
    [
        (ColumnTransforms(), "", ("dataset-npz-9e41eacda8001b46d567d16548f31af2", 0)),
        (
            ColumnTransforms(task=3, drop=("info", "obs.rgb"), float32=True),
            "more",
            ("dataset-npz-4aeef78afd702923ae8d1d1c392c1a19", 1017902413794976579),
        ),
    ],
    ids=["plain", "transformed"],
)
def test_keys_are_those_of_earlier_versions(transforms: ColumnTransforms, reload_label: str, sender: tuple[str, int]) -> None:
    """Computed by the version before the renames: other keys would store the episodes of repeated loads twice."""
    assert sender_of(FixedSource(), transforms, reload_label=reload_label, progress=lambda done, total: None) == sender  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("Changes", "ColumnTransforms"),
        ("UnholdableError", "UnsupportedEpisodeError"),
        ("survey", "inspect"),
        ("Refusals", "RefusalSummary"),
    ],
)
def test_former_name_is_the_present_one_and_warns(former: str, present: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"touchline.datasets.{former} is now touchline.datasets.{present}"):
        found = getattr(datasets, former)

    assert found is getattr(datasets, present)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Alterations'"):
        datasets.Alterations  # noqa: B018


def test_former_argument_works_and_warns(tmp_path: Path) -> None:
    np.savez(tmp_path / "demos.npz", **{"0/obs": np.zeros((3, 2)), "0/action": np.zeros((3, 1)), "0/reward": np.zeros(3)})
    seen: list[int] = []

    with pytest.warns(DeprecationWarning, match=r"inspect\((changes|watch)=\) is now inspect\((transforms|progress)=\)") as warned:
        report, columns = datasets.inspect(  # type: ignore[call-arg]
            str(tmp_path / "demos.npz"), changes=ColumnTransforms(task=4), watch=lambda stage, done, total, report: seen.append(done)
        )

    assert {warning.filename for warning in warned} == {__file__}
    assert len(warned) == 2 and report.read == 1 and "task" in columns and seen == [1]


def test_former_and_present_argument_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'changes' and 'transforms', which are the same argument"):
        datasets.inspect(str(tmp_path), changes=ColumnTransforms(), transforms=ColumnTransforms())  # type: ignore[call-arg]
