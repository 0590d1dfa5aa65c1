"""Where a run may save, by what lies there and what it goes on from."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_btx.checkpoint.iterations import BACKEND_FILE, TRACKER
from megatron_btx.common.errors import InputError
from megatron_btx.engine.fallback import check_save_folder
from megatron_btx.engine.saving import REPLACED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with a checkpoint, a link to it, and an empty folder beside."""
    folder = tmp_path / "run" / "iter_0000008"
    folder.mkdir(parents=True)
    (folder / BACKEND_FILE).write_text("{}")
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "other").mkdir()
    return tmp_path / "run"


def arguments(root: Path, load: str | None, save: str = "run", **more: object) -> Namespace:
    """A command line that saves there."""
    given = {"finetune": False, "skip_train": False, "non_persistent_global_ckpt_dir": None, **more}
    return Namespace(save=str(root.parent / save), load=load and str(root.parent / load), **given)


@pytest.mark.parametrize("load", ["run", "link", f"run/{REPLACED}", "run/non_persistent"])
def test_a_run_goes_on_in_its_folder(load, root):
    """By whatever name, and from what lies within."""
    check_save_folder(arguments(root, load))
    with pytest.raises(InputError, match="iter_0000008"):
        check_save_folder(arguments(root, load, finetune=True))


@pytest.mark.parametrize("load", [None, "other", "nowhere"])
def test_another_starts_in_another_folder(load, root):
    """Also where there is no tracker, or a tracker alone; not where nothing is saved, or a killed save is all."""
    with pytest.raises(InputError, match="iter_0000008"):
        check_save_folder(arguments(root, load))
    check_save_folder(arguments(root, load, skip_train=True))
    check_save_folder(arguments(root, load, save="new"))
    (root / "iter_0000008" / BACKEND_FILE).rename(root / "iter_0000008" / "__0_0.distcp")
    check_save_folder(arguments(root, load))
    (root / TRACKER).write_text("release")
    with pytest.raises(InputError, match=TRACKER):
        check_save_folder(arguments(root, load))
