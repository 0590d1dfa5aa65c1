"""Which iterations may go."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.checkpoint.iterations import BACKEND_FILE, TRACKER
from megatron_btx.checkpoint.retention import find_removable, remove_checkpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Whole checkpoints of steps 2 to 10, the last one the tracker's."""
    for step in range(2, 12, 2):
        folder = tmp_path / f"iter_{step:07d}"
        folder.mkdir()
        (folder / BACKEND_FILE).write_text("{}")
    (tmp_path / TRACKER).write_text("10")
    return tmp_path


def steps(folders: list[Path]) -> list[int]:
    return [int(folder.name.removeprefix("iter_")) for folder in folders]


@pytest.mark.parametrize(
    ("last", "every", "needed", "gone"),
    [
        (1, None, (), [2, 4, 6, 8]),
        (3, None, (), [2, 4]),
        (9, None, (), []),
        (1, 4, (), [2, 6]),
        (1, None, (6,), [2, 4, 8]),
        (2, 10, (2,), [4, 6]),
    ],
)
def test_what_goes(root, last, every, needed, gone):
    """All but the last, the M-th and the needed ones."""
    assert steps(find_removable(root, last, every, needed)) == gone


def test_a_half_written_one_counts_for_nothing_and_goes(root):
    """A kill left it: it is none of the last two."""
    (root / "iter_0000008" / BACKEND_FILE).unlink()
    assert steps(find_removable(root, 2, None)) == [2, 4, 8]


def test_what_is_above_the_tracker_stays(root):
    """Its saving goes on, or its tracker was never written: a run resumes below it."""
    (root / TRACKER).write_text("6")
    assert steps(find_removable(root, 1, None)) == [2, 4]


@pytest.mark.parametrize("tracker", ["", "release", "x"])
def test_without_a_step_in_the_tracker_all_stay(root, tracker):
    """Nobody knows which is the last."""
    (root / TRACKER).write_text(tracker)
    assert find_removable(root, 1, None) == []


def test_links_and_strangers_stay(root, tmp_path_factory):
    """What lies elsewhere, or has another name, is somebody's."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "iter_0000004"
    (root / "iter_0000004").rename(elsewhere)
    (root / "iter_0000004").symlink_to(elsewhere)
    for name in ("iter_4", "iter_000000x", "non_persistent", "release", "iter_0000002.bak"):
        (root / name).mkdir()
    (root / "iter_0000003").write_text("a file")
    assert steps(find_removable(root, 1, None)) == [2, 6, 8]


def test_half_removed_it_does_not_load(root, monkeypatch):
    """What makes it a checkpoint goes first."""

    def interrupted(_: Path) -> None:
        raise OSError(16, "busy")

    monkeypatch.setattr("megatron_btx.checkpoint.retention.shutil.rmtree", interrupted)
    with pytest.raises(OSError, match="busy"):
        remove_checkpoint(root / "iter_0000002")
    assert not (root / "iter_0000002" / BACKEND_FILE).exists()
    assert (root / "iter_0000002").is_dir()
