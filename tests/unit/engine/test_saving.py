"""Which iterations may go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_btx.checkpoint.iterations import BACKEND, BACKEND_FILE, TRACKER, list_iterations, read_tracker
from megatron_btx.engine.saving import REPLACED, find_removable, make_room, remove_checkpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Whole checkpoints of steps 2 to 10, the last one the tracker's."""
    for step in range(2, 12, 2):
        folder = tmp_path / f"iter_{step:07d}"
        folder.mkdir()
        (folder / BACKEND_FILE).write_text(json.dumps(BACKEND))
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


@pytest.mark.parametrize(
    ("names", "goes"),
    [
        (["__0_0.distcp", "__1_0.distcp"], True),
        (["__0_0.distcp", ".metadata"], False),
        (["mp_rank_00"], False),
        (["model.safetensors"], False),
    ],
)
def test_what_is_of_another_format_stays(root, names, goes):
    """Only what a killed save can have left goes: somebody's older format has no such file either."""
    folder = root / "iter_0000004"
    (folder / BACKEND_FILE).unlink()
    for name in names:
        (folder / name).write_text("")
    assert (4 in steps(find_removable(root, 1, None))) == goes


def test_a_damaged_one_counts_for_nothing_and_stays(root):
    """Its description is cut: what else of it can be saved is for a person to say."""
    (root / "iter_0000008" / BACKEND_FILE).write_text('{"sharded')
    assert steps(find_removable(root, 2, None)) == [2, 4]


def test_what_a_link_points_to_stays(root):
    """Somebody's best one."""
    (root / "best").symlink_to("iter_0000004")
    assert steps(find_removable(root, 1, None)) == [2, 6, 8]


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

    monkeypatch.setattr("megatron_btx.engine.saving.shutil.rmtree", interrupted)
    with pytest.raises(OSError, match="busy"):
        remove_checkpoint(root / "iter_0000002")
    assert not (root / "iter_0000002" / BACKEND_FILE).exists()
    assert (root / "iter_0000002").is_dir()


def whole(folder: Path) -> None:
    """A folder that is taken for a checkpoint; it says which."""
    folder.mkdir()
    (folder / BACKEND_FILE).write_text(json.dumps(BACKEND))
    (folder / "which").write_text(str(folder))


def test_what_lies_after_the_line_is_moved_aside(root):
    """Everything above the start, whole or damaged; half-written it goes. What was there before stays."""
    (root / "iter_0000008" / BACKEND_FILE).write_text('{"sharded')
    half = root / "iter_0000012"
    half.mkdir()
    (half / "__0_0.distcp").write_text("half")
    moved = make_room(root, 6, 4)
    assert steps(moved) == [6, 8, 10] and len({folder.parent for folder in moved}) == 1
    assert [step for step, _ in list_iterations(root)] == [2, 4]
    assert make_room(root, 6, 4) == []


def test_a_step_that_is_saved_again_keeps_its_first(root):
    """Also when the second save fails twice, and what it left is damaged or half-written."""
    whole(root / "iter_0000012")
    (root / TRACKER).write_text("12")
    for left in (["__0_0.distcp"], ["__0_0.distcp", BACKEND_FILE]):
        make_room(root, 12, 12)
        assert not (root / "iter_0000012").exists()
        assert (root / REPLACED / "iter_0000012/which").read_text() == str(root / "iter_0000012")
        assert read_tracker(root / REPLACED) == 12
        (root / "iter_0000012").mkdir()
        for name in left:
            (root / "iter_0000012" / name).write_text(json.dumps(BACKEND))
    make_room(root, 10, 10)
    assert [step for step, _ in list_iterations(root / REPLACED)] == [10]


@pytest.mark.parametrize("target", ["elsewhere", "gone", "file"])
def test_nothing_is_written_through_a_link(target, root, tmp_path_factory):
    """Somebody's folder, behind a relative link with the step's name, is not written over; links to it follow."""
    other = tmp_path_factory.mktemp("other") / target
    if target == "elsewhere":
        whole(other)
    elif target == "file":
        other.write_text("a file")
    link = root / "iter_0000012"
    link.symlink_to(os.path.relpath(other, root))
    (root / "best").symlink_to("iter_0000008")
    moved = make_room(root, 12, 6)
    assert sorted(steps(moved)) == [8, 10, 12]
    assert not os.path.lexists(link) and (root / "best").resolve() == moved[0].parent / "iter_0000008"
    assert (moved[0].parent / link.name).resolve() == other
