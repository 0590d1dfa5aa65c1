"""The runner on graphs of small real commands: order, skipping, changes, resuming, failure, signals, locks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_btx.common import manifest as manifests
from megatron_btx.common.errors import InputError
from megatron_btx.common.manifest import read_manifest
from megatron_btx.plan.stage import Stage
from megatron_btx.runner import processes
from megatron_btx.runner.decisions import decide
from megatron_btx.runner.local import Machine
from megatron_btx.runner.run_dir import is_locked, lock_run
from megatron_btx.runner.scripts import command_script
from megatron_btx.runner.stage_run import failure_message, killed_by
from tests.unit.runner.running import run_stages

WAIT_SECONDS = 30.0


class Recorder:
    """A reporter that remembers the states, and calls ``on_update`` at every turn of the runner."""

    def __init__(self, on_update: Callable[[], None] = lambda: None) -> None:
        self.states: list[tuple[str, str]] = []
        self.update = on_update

    def set(self, stage: str, state: str, why: str = "") -> None:
        self.states.append((stage, state))

    def of(self, state: str) -> list[str]:
        return [stage for stage, its_state in self.states if its_state == state]


def shell(name: str, script: str, *parents: str, processes: int = 1, resumable: bool = False) -> Stage:
    """A stage that runs ``script`` in the run directory and makes NAME/out."""
    return Stage(name, ("bash", "-c", script), parents, product="out", processes=processes, resumable=resumable)


def appending(name: str, *parents: str, text: str = "x") -> Stage:
    """A stage that makes its product, and notes in the run's trace that it was executed."""
    return shell(name, f"echo {name} >> trace; echo {text} > {name}/out", *parents)


def diamond(text_of_left: str = "x") -> list[Stage]:
    """a -> left, right -> end; beside them right's own child."""
    return [
        appending("a"),
        appending("left", "a", text=text_of_left),
        appending("right", "a"),
        appending("end", "left", "right"),
        appending("beside", "right"),
    ]


def run(
    stages: list[Stage], directory: Path, cores: int = 2, only: tuple[str, ...] = (), rerun: tuple[str, ...] = ()
) -> tuple[int, Recorder]:
    recorder = Recorder()
    return run_stages(stages, directory, Machine((), cores), recorder, only, rerun=rerun), recorder


def trace(directory: Path) -> list[str]:
    return (directory / "trace").read_text().split()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_SECONDS} s for {what}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def no_stragglers(tmp_path: Path) -> Iterator[None]:
    yield
    wait_for(lambda: not processes.marked(processes.mark_of(tmp_path)), "the end of all processes of the run")


def test_parents_run_before_children_and_a_second_run_skips_everything(tmp_path: Path) -> None:
    code, _ = run(diamond(), tmp_path)
    order = trace(tmp_path)
    assert code == 0
    assert sorted(order) == ["a", "beside", "end", "left", "right"]
    assert order[0] == "a" and order.index("end") > max(order.index("left"), order.index("right"))
    code, recorder = run(diamond(), tmp_path)
    assert code == 0 and trace(tmp_path) == order
    assert len(recorder.of("skipped")) == 5


def test_a_changed_stage_is_kept_with_all_that_depends_on_it_until_its_rerun_is_asked_for(tmp_path: Path) -> None:
    run(diamond(), tmp_path)
    (tmp_path / "trace").unlink()
    (tmp_path / "left" / "notes").write_text("of the earlier settings")
    before = files_in(tmp_path)
    actions = decide(diamond("y"), tmp_path)
    assert {name: action.verb for name, action in actions.items()} == {
        **dict.fromkeys(("a", "right", "beside"), "skip"),
        **dict.fromkeys(("left", "end"), "keep"),
    }
    assert "value 3 of 3" in actions["left"].why and actions["end"].why == "made from another left"
    for rerun in ((), ("left",), ("end",)):
        with pytest.raises(InputError, match="made otherwise"):
            run(diamond("y"), tmp_path, rerun=rerun)
    assert files_in(tmp_path) == before
    code, _ = run(diamond("y"), tmp_path, rerun=("left", "end"))
    assert code == 0 and trace(tmp_path) == ["left", "end"]
    assert (tmp_path / "left" / "out").read_text() == "y\n"
    assert [path.read_text() for path in tmp_path.glob("left.*/notes")] == ["of the earlier settings"]
    assert [path.read_text() for path in tmp_path.glob("left.*/out")] == ["x\n"]
    assert {action.verb for action in decide(diamond("y"), tmp_path).values()} == {"skip"}


def files_in(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory`` but its lock, with its content."""
    found = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_a_moved_run_still_counts(tmp_path: Path) -> None:
    run(diamond(), tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert {action.verb for action in decide(diamond(), tmp_path / "there").values()} == {"skip"}


def test_a_changed_outside_input_is_a_change(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.with_suffix(".bin").write_bytes(b"1")
    stage = Stage("a", ("bash", "-c", "touch a/out"), inputs=(corpus,), product="out")
    run([stage], tmp_path / "run")
    assert decide([stage], tmp_path / "run")["a"].verb == "skip"
    os.utime(corpus.with_suffix(".bin"), (1, 1))
    assert decide([stage], tmp_path / "run")["a"].verb == "skip"
    (tmp_path / "elsewhere").mkdir()
    moved = corpus.with_suffix(".bin").rename(tmp_path / "elsewhere" / "text.bin")
    there = replace(stage, inputs=(moved.with_suffix(""),))
    assert decide([there], tmp_path / "run")["a"].verb == "skip"
    moved.write_bytes(b"2")
    assert decide([there], tmp_path / "run")["a"].verb == "keep"


def test_a_finished_stage_whose_product_is_gone_waits_to_be_asked(tmp_path: Path) -> None:
    run([appending("a")], tmp_path)
    (tmp_path / "a" / "out").unlink()
    assert decide([appending("a")], tmp_path)["a"].why == "finished, but its out is gone"
    with pytest.raises(InputError, match="its out is gone"):
        run([appending("a")], tmp_path)
    run([appending("a")], tmp_path, rerun=("a",))
    assert trace(tmp_path) == ["a", "a"]


def test_independent_stages_run_side_by_side(tmp_path: Path) -> None:
    meet = "touch {0}/here; for _ in $(seq 300); do [ -e {1}/here ] && touch {0}/out && exit 0; sleep .1; done; exit 1"
    stages = [shell("one", meet.format("one", "two")), shell("two", meet.format("two", "one"))]
    code, _ = run(stages, tmp_path)
    assert code == 0


def test_no_more_run_at_once_than_there_are_cores(tmp_path: Path) -> None:
    alone = "mkdir busy || exit 1; sleep .5; rmdir busy; touch {0}/out"
    stages = [shell(name, alone.format(name), processes=size) for name, size in (("one", 1), ("two", 2), ("big", 9))]
    code, _ = run(stages, tmp_path, cores=1)
    assert code == 0


def test_the_longest_chain_of_work_starts_first(tmp_path: Path) -> None:
    def sized(name: str, tokens: int, *parents: str) -> Stage:
        script = f"echo {name} >> trace; touch {name}/out"
        return Stage(name, ("bash", "-c", script), parents, product="out", tokens=tokens)

    code, _ = run([sized("short", 10), sized("first", 5), sized("second", 20, "first")], tmp_path, cores=1)
    assert code == 0
    assert trace(tmp_path) == ["first", "second", "short"]


def test_gpus_are_shared_out_and_too_few_are_refused(tmp_path: Path) -> None:
    script = "echo $CUDA_VISIBLE_DEVICES > {0}/out; sleep .5"
    stages = [
        Stage(name, ("bash", "-c", script.format(name)), product="out", processes=size, on_gpu=on_gpu)
        for name, size, on_gpu in (("one", 1, True), ("two", 1, True), ("none", 4, False))
    ]
    assert run_stages(stages, tmp_path, Machine(("4", "7"), 1), Recorder()) == 0
    assert {(tmp_path / name / "out").read_text().strip() for name in ("one", "two")} == {"4", "7"}
    assert (tmp_path / "none" / "out").read_text().strip() == ""
    wide = Stage("wide", ("true",), processes=3, on_gpu=True)
    with pytest.raises(InputError, match="wide: 3 processes need as many GPUs, found 2"):
        run_stages([wide], tmp_path, Machine(("4", "7"), 1), Recorder())


def test_a_failure_shows_the_log_stops_the_others_and_leaves_them_resumable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_stragglers: None
) -> None:
    wait = "until [ -e slow/started ]; do sleep .1; done"
    slow = shell("slow", "touch slow/started; sleep 100", resumable=True)
    bad = shell("bad", f"{wait}; seq 40; echo the reason; exit 7")
    code, recorder = run([slow, bad, appending("child", "bad")], tmp_path)
    shown = capsys.readouterr().err
    assert code == 1
    assert "stage bad ended with status 7" in shown and str(tmp_path / "bad" / "log.txt") in shown
    assert "the reason" in shown and "  27\n" in shown and "  25\n" not in shown
    assert recorder.of("failed") == ["bad"] and recorder.of("stopped") == ["slow"]
    assert "child" not in recorder.of("running")
    actions = decide([slow, bad], tmp_path)
    assert (actions["slow"].verb, actions["bad"].verb) == ("resume", "run")


@pytest.mark.parametrize(
    "script",
    [
        "echo 'error: no such corpus' >&2; exit 2",
        "echo 'error: no such corpus'; echo '  exitcode  : 2 (pid: 5)'; exit 1",
        "echo 'pretrain.py: error: no such corpus'; exit 2",
        "echo 'btx convert: error: no such corpus'; exit 2",
    ],
)
def test_bad_input_of_a_stage_is_one_line_and_status_2(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run([shell("a", f"echo noise; {script}")], tmp_path)
    shown = capsys.readouterr().err
    assert code == 2
    assert "no such corpus" in shown and "noise" not in shown


def test_an_error_line_of_an_earlier_start_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = shell("a", "[ -e mended ] || { echo 'error: first'; exit 2; }; echo 'error: second'; exit 2")
    run([stage], tmp_path)
    (tmp_path / "mended").touch()
    capsys.readouterr()
    run([stage], tmp_path)
    assert "second" in (shown := capsys.readouterr().err) and "first" not in shown
    assert "error: first" in (tmp_path / "a" / "log.txt").read_text()


def test_another_failure_is_not_taken_for_bad_input() -> None:
    message, status = failure_message("error: a word in passing\nTraceback\nValueError: x\n", 1, "seed")
    assert status == 1 and "ValueError: x" in message


def test_torchruns_report_does_not_hide_the_reason() -> None:
    report = "W1123 21:07:41 5 lib/torch/distributed/elastic/multiprocessing/api.py:1] closing\n" + "noise\n" * 40
    message, status = failure_message(f"[rank1]: AssertionError: no sample\n{report}", 1, "seed")
    assert status == 1 and message == "  [rank1]: AssertionError: no sample"
    assert "noise" in failure_message(report, 1, "seed")[0]


def test_a_killed_rank_is_said_first() -> None:
    """torchrun tells it in a report of its own, below what looks like progress; it ends the other ranks by SIGTERM."""
    progress = "".join(f"step {number} loss 3.1\n" for number in range(40))
    report = "E1123 21:07:41 5 lib/torch/distributed/elastic/multiprocessing/api.py:1] failed\n"
    report += "[1]:\n  exitcode  : -15 (pid: 5)\n  traceback : Signal 15 (SIGTERM) received by PID 5\n"
    report += "Root Cause (first observed failure):\n[0]:\n  exitcode  : -9 (pid: 4)\n"
    assert killed_by(progress + report, 1).startswith(
        "a rank was killed by signal 9 (SIGKILL), most likely for want of"
    )
    message, status = failure_message(progress + report, 1, "seed")
    assert status == 1 and message.endswith("  step 39 loss 3.1") and message.count("\n") == 14
    assert killed_by("exitcode  : -15 (pid: 5)", 1) == "a rank was killed by signal 15 (SIGTERM)"
    for code in (-9, 137):
        assert killed_by(progress, code).startswith("its process was killed by signal 9 (SIGKILL), most likely")
    for code in (1, 2, 128, 255):
        assert killed_by(progress, code) == ""


def test_a_stage_whose_process_is_killed_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run([shell("a", "echo step 1; kill -KILL $$")], tmp_path)
    said = capsys.readouterr().err
    assert code == 1 and said.startswith("error: stage a failed: its process was killed by signal 9 (SIGKILL), most l")


def test_an_interpreter_of_the_environment_is_not_the_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many a shell has a PYTHON, and a CDPATH that holds another folder of the run's name."""
    monkeypatch.setenv("PYTHON", "false")
    stage = Stage("a", ("python", "-c", "import sys; open('a/out', 'w').write(sys.executable)"), product="out")
    assert run([stage], tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "a" / "out").read_text() == sys.executable
    other = {**os.environ, "BTX_PYTHON": "false"}
    command = tmp_path / "run" / "a" / "command.sh"
    assert subprocess.run(["bash", str(command)], env=other, check=False).returncode == 1


def test_command_sh_runs_in_its_own_run(tmp_path: Path) -> None:
    """However it is called, whatever CDPATH holds, and wherever the interpreter lies."""
    stage = Stage("a", ("bash", "-c", "pwd > a/out"), product="out")
    for run_folder in ("mine", "other"):
        (tmp_path / run_folder / "run" / "a").mkdir(parents=True)
    (tmp_path / "mine" / "run" / "a" / "command.sh").write_text(command_script(stage))
    environment = {**os.environ, "CDPATH": str(tmp_path / "other")}
    subprocess.run(["bash", "run/a/command.sh"], cwd=tmp_path / "mine", env=environment, check=True)
    assert (tmp_path / "mine" / "run" / "a" / "out").read_text() == f"{tmp_path / 'mine' / 'run'}\n"
    assert not (tmp_path / "other" / "run" / "a" / "out").exists()


@pytest.mark.parametrize("by_variable", [False, True])
@pytest.mark.parametrize("place", ["a b", "it's", 'a"b', "$HOME", "a}b", "*", "$(touch ran)"])
def test_an_interpreter_may_lie_anywhere(
    place: str, by_variable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / place / "python"
    interpreter.parent.mkdir()
    interpreter.symlink_to("/bin/true")
    if by_variable:
        monkeypatch.setenv("BTX_PYTHON", str(interpreter))
    else:
        monkeypatch.setattr(sys, "executable", str(interpreter))
    (tmp_path / "run" / "a").mkdir(parents=True)
    command = tmp_path / "run" / "a" / "command.sh"
    command.write_text(command_script(Stage("a", ("python", "-c", "raise SystemExit(1)"))))
    subprocess.run(["bash", str(command)], check=True)
    assert list(tmp_path.rglob("ran")) == []


def test_a_stage_that_ends_well_without_its_product_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run([shell("a", "true")], tmp_path)
    assert code == 1 and "without its product out" in capsys.readouterr().err


def test_training_that_ends_early_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = "checkpoint/latest_checkpointed_iteration.txt"
    script = f"mkdir -p a/checkpoint; echo ${{STEPS:-5}} > a/{tracker}"
    stage = Stage("a", ("bash", "-c", script), product=tracker, iterations=10, resumable=True)
    code, _ = run([stage], tmp_path)
    assert code == 1 and "ended at iteration 5 of 10" in capsys.readouterr().err
    assert decide([stage], tmp_path)["a"].verb == "resume"


def test_a_stage_that_cannot_resume_starts_without_its_partial_product(tmp_path: Path) -> None:
    script = "[ -e a/partial ] && exit 3; mkdir a/partial; [ -e mended ] && touch a/out"
    run([shell("a", script)], tmp_path)
    assert (tmp_path / "a" / "partial").exists()
    (tmp_path / "mended").touch()
    code, _ = run([shell("a", script)], tmp_path)
    assert code == 0
    assert (read_manifest(tmp_path / "a") or {})["starts"] == 2


def test_only_runs_what_it_names_and_wants_finished_parents(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="left: it needs a, which is not finished"):
        run(diamond(), tmp_path, only=("left",))
    code, _ = run(diamond(), tmp_path, only=("a", "left"))
    assert code == 0 and trace(tmp_path) == ["a", "left"]
    with pytest.raises(InputError, match="--only lefd: no such stage"):
        run(diamond(), tmp_path, only=("lefd",))


STRANGERS = {
    "a file of its own": {"thesis.txt": "my only copy"},
    "another program's manifest": {"manifest.json": '{"files": 3}', "my_corpus.jsonl": "x"},
    "another stage's manifest": {"manifest.json": '{"stage": "b", "status": "finished"}'},
    "a config.yaml": {"config.yaml": "lr: 1", "model.bin": "x"},
    "broken JSON": {"manifest.json": "{", "model.bin": "x"},
    "a list": {"manifest.json": "[]"},
}


@pytest.mark.parametrize("content", STRANGERS.values(), ids=STRANGERS)
def test_a_folder_that_no_stage_made_is_refused_and_not_touched(content: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, text in content.items():
        (tmp_path / "a" / name).write_text(text)
    before = files_in(tmp_path)
    for rerun in ((), ("a",)):
        with pytest.raises(InputError, match=r"move (it|its folder) away"):
            run([appending("first"), appending("a", "first")], tmp_path, rerun=rerun)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("target", ["file", "dangling"])
def test_what_is_no_folder_is_refused_where_a_stage_needs_one(target: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "a").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match="is no folder"):
        run([appending("a")], tmp_path)
    assert (tmp_path / "a").is_symlink() and (tmp_path / "file").read_text() == "mine"


def test_a_stage_folder_that_is_a_link_is_set_aside_as_a_link(tmp_path: Path) -> None:
    run([appending("a")], tmp_path / "run")
    (tmp_path / "run" / "a").rename(tmp_path / "disk")
    (tmp_path / "run" / "a").symlink_to(tmp_path / "disk")
    before = files_in(tmp_path / "disk")
    assert decide([appending("a")], tmp_path / "run")["a"].verb == "skip"
    assert run([appending("a", text="y")], tmp_path / "run", rerun=("a",))[0] == 0
    assert files_in(tmp_path / "disk") == before
    assert not (tmp_path / "run" / "a").is_symlink() and (tmp_path / "run" / "a" / "out").read_text() == "y\n"
    assert [path.is_symlink() for path in (tmp_path / "run").glob("a.*")] == [True]


def test_a_kill_while_a_folder_is_made_leaves_one_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".manifest.json.4711").write_text('{"sta')
    assert run([appending("a")], tmp_path)[0] == 0


@pytest.mark.parametrize("name", ["plan.json", "recipe.yaml"])
def test_files_of_a_runs_names_that_no_run_wrote_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("# mine")
    records = {"plan.json": '[{"stage": "a"}]', "recipe.yaml": "{}"}
    with pytest.raises(InputError, match="not written by btx run"):
        run_stages([appending("a")], tmp_path, Machine((), 1), Recorder(), records=records)
    assert files_in(tmp_path) == {name: b"# mine"}
    for _ in range(2):
        assert run_stages([appending("a")], tmp_path / "new", Machine((), 1), Recorder(), records=records) == 0


def test_a_run_directory_is_held_by_one_runner(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(InputError, match="another btx run, a job or a command.sh is at work"):
            run([appending("a")], tmp_path)
    assert not is_locked(tmp_path)
    assert run([appending("a")], tmp_path)[0] == 0


def test_the_manifest_says_what_was_done(tmp_path: Path) -> None:
    run(diamond(), tmp_path)
    manifest, parent = read_manifest(tmp_path / "left") or {}, read_manifest(tmp_path / "a") or {}
    assert manifest["status"] == "finished" and manifest["stage"] == "left"
    assert manifest["parents"] == {"a": parent["fingerprint"]}
    assert manifest["versions"]["megatron-core"].startswith("0.19")
    assert manifest["seconds"] > 0 and manifest["exit"] == 0


def test_seconds_add_up_over_starts(tmp_path: Path) -> None:
    stage = shell("a", "sleep .6; [ -e mended ] && touch a/out")
    run([stage], tmp_path)
    (tmp_path / "mended").touch()
    run([stage], tmp_path)
    assert (read_manifest(tmp_path / "a") or {})["seconds"] >= 1.2


def test_the_command_by_hand_is_the_command_that_was_run(tmp_path: Path) -> None:
    quoted = 'printf \'%s|\' "$OMP_NUM_THREADS" "$1" > a/out'
    stage = Stage("a", ("bash", "-c", quoted, "--", 'it\'s $HOME; "two  words"'), product="out", threads=3)
    run([stage], tmp_path)
    assert (tmp_path / "a" / "command.sh").read_text() == command_script(stage)
    by_runner = (tmp_path / "a" / "out").read_text()
    assert by_runner == '3|it\'s $HOME; "two  words"|'
    (tmp_path / "a" / "out").unlink()
    subprocess.run(["bash", str(tmp_path / "a" / "command.sh")], cwd="/", check=True)
    assert (tmp_path / "a" / "out").read_text() == by_runner


# A stage that counts to 20 in its own session, leaving a grandchild in another one, as torchrun's workers do.
_COUNTER = """
import pathlib, subprocess, sys, time
here = pathlib.Path("count")
child = subprocess.Popen(["sleep", "100"], start_new_session=True)
(here / "pids").write_text(f"{child.pid} {__import__('os').getpid()}")
state = here / "state"
start = int(state.read_text()) if state.exists() else 0
with (here / "starts").open("a") as starts:
    print(start, file=starts)
for step in range(start, 20):
    (here / "state.new").write_text(str(step + 1))
    (here / "state.new").replace(state)
    time.sleep(0.1)
child.kill()
(here / "out").touch()
"""


def counter() -> Stage:
    return Stage("count", ("python", "-c", _COUNTER), product="out", resumable=True)


def start_runner(directory: Path) -> subprocess.Popen[bytes]:
    """Another process that runs the counter in ``directory``."""
    program = f"""
        import sys
        from pathlib import Path
        from megatron_btx.runner.tables import Progress
        from megatron_btx.runner.local import Machine
        from tests.unit.runner.running import run_stages
        from megatron_btx.plan.stage import Stage
        stages = [Stage("count", ("python", "-c", {_COUNTER!r}), product="out", resumable=True)]
        run = Path({str(directory)!r})
        with Progress(run, stages) as progress:
            sys.exit(run_stages(stages, run, Machine((), 2), progress))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)


def count(directory: Path) -> int:
    state = directory / "count" / "state"
    return int(state.read_text()) if state.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_runner_leaves_no_process_and_the_next_one_resumes(
    number: signal.Signals, tmp_path: Path, no_stragglers: None
) -> None:
    runner = start_runner(tmp_path)
    wait_for(lambda: count(tmp_path) >= 3, "the first steps")
    pids = [int(pid) for pid in (tmp_path / "count" / "pids").read_text().split()]
    assert all(alive(pid) for pid in pids)
    os.kill(runner.pid, number)
    code = runner.wait(WAIT_SECONDS)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    said = f"error: stopped by {number.name}; the same command goes on from here\n"
    assert runner.stderr is not None
    assert runner.stderr.read().decode() == (said if number != signal.SIGKILL else "")
    wait_for(lambda: not any(alive(pid) for pid in pids), "the end of the stage and its grandchild")
    reached = count(tmp_path)
    assert 3 <= reached < 20
    status = "running" if number == signal.SIGKILL else "stopped"
    assert json.loads((tmp_path / "count" / "manifest.json").read_text())["status"] == status
    assert decide([counter()], tmp_path)["count"].verb == "resume"
    assert run([counter()], tmp_path)[0] == 0
    assert (tmp_path / "count" / "starts").read_text().split() == ["0", str(reached)]


def test_a_new_run_ends_what_a_killed_one_left_even_without_its_guard(tmp_path: Path, no_stragglers: None) -> None:
    mark = {**os.environ, processes.MARK_VARIABLE: f"{processes.mark_of(tmp_path)}gone:count:"}
    left = subprocess.Popen(["sleep", "100"], env=mark, start_new_session=True)
    assert run([appending("a")], tmp_path)[0] == 0
    assert left.wait(1.0) == -signal.SIGTERM


def test_a_process_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    mark = {**os.environ, processes.MARK_VARIABLE: f"{tmp_path}:stubborn:"}
    stubborn = subprocess.Popen(["bash", "-c", f"trap '' TERM; touch {tmp_path}/up; sleep 100 & wait; wait"], env=mark)
    wait_for((tmp_path / "up").exists, "the trap")
    assert processes.end_marked(f"{tmp_path}:stubborn:", grace_seconds=0.5) >= 1
    assert stubborn.wait(5.0) == -signal.SIGKILL
    assert not processes.marked(f"{tmp_path}:stubborn:")


def test_a_mark_is_no_prefix_of_a_longer_name(tmp_path: Path) -> None:
    """The end of stage dense must not end stage dense-domains."""
    waiting = "until [ -e dense/out ]; do sleep .1; done; sleep 1; touch dense-domains/out"
    code, _ = run([shell("dense-domains", waiting), shell("dense", "touch dense/out")], tmp_path)
    assert code == 0


def test_what_a_finished_stage_left_behind_is_ended_before_its_children_start(tmp_path: Path) -> None:
    leaving = shell("a", "setsid sleep 100 & echo $! > a/out")
    gone = "read -r _ _ state _ < /proc/$(cat a/out)/stat; [ ${state:-Z} = Z ] && touch b/out"
    code, _ = run([leaving, shell("b", gone, "a")], tmp_path)
    assert code == 0


def test_what_trained_is_kept_and_what_did_not_starts_anew(tmp_path: Path) -> None:
    """Unfinished and changed: with a checkpoint it is worth something, without one it starts from nothing."""
    run([shell("a", "touch a/metrics; exit 1", resumable=True)], tmp_path)
    changed = shell("a", "[ ! -e a/metrics ] && mkdir a/checkpoint && touch a/checkpoint/x; exit 1", resumable=True)
    assert decide([changed], tmp_path)["a"].verb == "rerun"
    run([changed], tmp_path)
    assert (tmp_path / "a" / "checkpoint" / "x").exists() and len(list(tmp_path.glob("a.*/metrics"))) == 1
    again = shell("a", "[ ! -e a/checkpoint ] && touch a/out", resumable=True)
    assert decide([again], tmp_path)["a"].verb == "keep"
    assert run([again], tmp_path, rerun=("a",))[0] == 0
    assert len(list(tmp_path.glob("a.*/checkpoint/x"))) == 1


def test_leftovers_of_a_stopped_try_are_set_aside_with_whatever_else_lies_there(tmp_path: Path) -> None:
    run([shell("a", "touch a/partial a/.journal; exit 3")], tmp_path)
    (tmp_path / "a" / "my notes").write_text("mine")
    assert run([shell("a", "touch a/partial a/.journal; exit 3")], tmp_path)[0] == 1
    assert sorted(path.name for path in tmp_path.glob("a.*/*")) == ["my notes", "partial"]
    assert (tmp_path / "a" / ".journal").exists()


def test_a_report_is_made_again_in_place_and_never_keeps_a_run_from_going_on(tmp_path: Path) -> None:
    made = appending("a")
    report = Stage("report", ("bash", "-c", "cat a/out >> report/out"), ("a",), product="out", only_shows=True)
    (tmp_path / "report").mkdir()
    manifests.mark(tmp_path / "report", "report")
    (tmp_path / "report" / "mine").write_text("a note")
    assert run([made, report], tmp_path)[0] == 0
    assert {action.verb for action in decide([made, report], tmp_path).values()} == {"skip"}
    other = replace(made, settings={"x": 1})
    actions = decide([other, report], tmp_path)
    assert (actions["a"].verb, actions["report"].verb) == ("keep", "run")
    assert run([other, report], tmp_path, rerun=("a",))[0] == 0
    assert (tmp_path / "report" / "out").read_text() == "x\nx\n"
    assert (tmp_path / "report" / "mine").exists() and not list(tmp_path.glob("report.*"))
    (tmp_path / "report" / "out").unlink()
    assert run([other, report], tmp_path)[0] == 0 and (tmp_path / "report" / "out").exists()


def test_what_only_has_to_be_there_before_is_no_part_of_the_result(tmp_path: Path) -> None:
    bound = appending("bound")
    trained = replace(appending("a"), after=("bound",))
    assert run([bound, trained], tmp_path)[0] == 0 and trace(tmp_path) == ["bound", "a"]
    actions = decide([replace(bound, settings={"tokens": 1}), trained], tmp_path)
    assert (actions["bound"].verb, actions["a"].verb) == ("keep", "skip")


def test_a_run_does_not_end_the_processes_of_one_whose_path_begins_alike(tmp_path: Path) -> None:
    other = {**os.environ, processes.MARK_VARIABLE: f"{processes.mark_of(tmp_path / 'a:b')}1:count:"}
    beside = subprocess.Popen(["sleep", "100"], env=other)
    try:
        assert run([appending("x")], tmp_path / "a")[0] == 0
        assert beside.poll() is None
    finally:
        beside.kill()
        beside.wait()


def test_a_manifest_of_an_earlier_version_is_kept(tmp_path: Path) -> None:
    run([appending("a")], tmp_path)
    manifest = read_manifest(tmp_path / "a") or {}
    del manifest["settings"]
    manifests.write_manifest(tmp_path / "a", manifest | {"fingerprint": "of another kind"})
    action = decide([appending("a")], tmp_path)["a"]
    assert action.verb == "keep" and "states no settings" in action.why
