"""Faults of whole runs, each a row of docs/faults.md: what is said, how soon no rank is left, and what is lost."""

import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpcompile.errors import CPError, StorageError
from cpcompile.train import Interrupted, RankError, checkpoint
from cpcompile.train.events import Event, Note, Step
from cpcompile.train.launch import launch
from cpcompile.train.lock import locked
from cpcompile.train.options import TrainOptions
from cpcompile.train.report import append_log
from tests.graph.test_train_loop import run
from tests.train_support import tiny_options

ROOT = Path(__file__).parents[2]


def options_of(folder: Path, **changes: Any) -> TrainOptions:
    """Options of a run that would not end by itself; the first checkpoint is of step 5."""
    return tiny_options(
        folder, **{"ranks": 2, "steps": 1_000_000, "apply": False, "save_every": 5, "save": folder / "run", **changes}
    )


def end_of(
    options: TrainOptions, fault: Callable[[], None], step: int = 7, within: float = 20.0
) -> tuple[Any, list[Event]]:
    """Train, cause `fault` after `step`, and return what was raised and the events; no rank is left after a few seconds."""
    events: list[Event] = []
    began: list[float] = []

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step) and event.step >= step and not began:
            began.append(time.monotonic())
            fault()

    with pytest.raises((CPError, Interrupted)) as raised:
        launch(options, hear)
    assert began, f"ended before the fault: {raised.value}"
    seconds = time.monotonic() - began[0]
    print(f"\n{seconds:.1f} s: {raised.value}")
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("rank ")]
    assert seconds < within
    return raised.value, events


def rank(number: int) -> int:
    """Return the process of a rank."""
    return next(child for child in multiprocessing.active_children() if child.name == f"rank {number}").pid or 0


def last_step(events: list[Event]) -> int:
    return max(event.step for event in events if isinstance(event, Step))


def test_a_stopped_rank_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = options_of(tmp_path, heartbeat=12.0)  # long enough for a machine with much else to do
    error, events = end_of(options, lambda: os.kill(rank(1), signal.SIGSTOP))
    assert [event.text for event in events if isinstance(event, Note)][-1].startswith("rank 1 is behind")
    said = capfd.readouterr().err
    assert "rank 0: the last messages" in said
    assert "rank 1: the last messages" not in said
    assert isinstance(error, RankError)
    assert re.fullmatch(
        r"rank 1 gave no sign of life for 12 s \(process \d+, stopped \(SIGSTOP\)\); all ranks were ended\. "
        r"--heartbeat SECONDS waits longer\. --resume continues after step \d+\.",
        str(error),
    )


@pytest.mark.always
def test_sigterm_saves_first_and_nothing_is_lost(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    end, events = end_of(options, lambda: os.kill(os.getpid(), signal.SIGTERM))
    step = last_step(events)
    assert (end.code, str(end)) == (
        143,
        f"SIGTERM: ended after step {step} of 1000000; checkpoint-{step:06d} is saved, --resume continues from it.",
    )
    assert Note("SIGTERM: saving a checkpoint after this step.") in events
    assert checkpoint.load(tmp_path / "run").step == step

    # The same run, never interrupted: what follows the checkpoint of two ranks is the same curve on one.
    resumed = run(tmp_path, apply=False, save=tmp_path / "run", save_every=5, steps=step + 2, resume=True)
    (tmp_path / "log.jsonl").unlink()
    whole = run(tmp_path, apply=False, steps=step + 2)
    assert [record["step"] for record in resumed] == [step + 1, step + 2]
    assert [record["loss"] for record in resumed] == [record["loss"] for record in whole[step:]]


def test_a_full_disk_for_the_log_ends_after_a_checkpoint(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    error, events = end_of(options_of(tmp_path), lambda: append_log(full, Step(7, 1.0, 1.0, 1.0, 1.0, 1)))
    assert isinstance(error, StorageError)
    step = last_step(events)
    assert str(error) == (
        "--log /dev/full cannot be written: No space left on device. The run ended after step "
        f"{step} of 1000000; checkpoint-{step:06d} is saved, --resume continues from it."
    )


@pytest.mark.slow
def test_a_killed_rank(tmp_path: Path) -> None:
    error, _ = end_of(options_of(tmp_path), lambda: os.kill(rank(1), signal.SIGKILL))
    assert str(error) == (
        "rank 1 was killed by SIGKILL (out of memory?); all ranks were ended. "
        f"--resume continues after step {checkpoint.load(tmp_path / 'run').step}."
    )


@pytest.mark.slow
def test_a_stopped_rank_that_goes_on_in_time(tmp_path: Path) -> None:
    def stop_for_a_while() -> None:
        os.kill(rank(1), signal.SIGSTOP)
        time.sleep(3.0)
        os.kill(rank(1), signal.SIGCONT)

    options = options_of(tmp_path, heartbeat=6.0, steps=20)
    events: list[Event] = []

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step) and event.step == 7:
            stop_for_a_while()

    launch(options, hear)
    assert last_step(events) == 20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_without_a_folder_ends_at_once(tmp_path: Path, number: int) -> None:
    end, _ = end_of(options_of(tmp_path, save=None), lambda: os.kill(os.getpid(), number))
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert (end.code, str(end)) == (128 + number, f"{name}: all ranks were ended; nothing was saved.")


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_one_does_not_wait(tmp_path: Path) -> None:
    end, events = end_of(options_of(tmp_path), lambda: os.kill(os.getpid(), signal.SIGINT))
    assert (end.code, str(end)) == (
        130,
        f"Ctrl-C: ended after step {last_step(events)} of 1000000; checkpoint-{last_step(events):06d} is saved, "
        "--resume continues from it.",
    )
    assert Note("Ctrl-C: saving a checkpoint after this step (Ctrl-C again ends at once).") in events

    def twice() -> None:
        os.kill(rank(1), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    again = options_of(tmp_path, save=tmp_path / "other")
    end, _ = end_of(again, twice, within=5.0)
    assert str(end).startswith("Ctrl-C: all ranks were ended; ")
    assert end.code == 130


@pytest.mark.slow
def test_sigterm_for_one_rank_only_ends_all_after_the_same_step(tmp_path: Path) -> None:
    end, events = end_of(options_of(tmp_path), lambda: os.kill(rank(1), signal.SIGTERM))
    assert str(end).startswith(f"SIGTERM: ended after step {last_step(events)} of")
    assert checkpoint.load(tmp_path / "run").step == last_step(events)


@pytest.mark.slow
def test_a_full_disk_for_a_checkpoint(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.prlimit(rank(0), resource.RLIMIT_FSIZE, (20_000, limits[1]))  # type: ignore[attr-defined]

    error, _ = end_of(options_of(tmp_path), fill)
    assert "File too large" in str(error)
    last = checkpoint.load(tmp_path / "run").step
    assert str(error).startswith(f"the checkpoint of step {last + 5} cannot be written to")
    assert str(error).endswith(f"that of step {last} is whole, --resume continues from it.")


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_two_ranks(tmp_path: Path) -> None:
    options = options_of(tmp_path, learning_rate=1e30, save=None)
    error, _ = end_of(options, lambda: None, step=1)
    assert str(error).startswith("step 2: the loss is nan and the gradient norm nan on all 2 ranks.")


# The command line without the compiler, whose time is not the subject.
SCRIPT = """
import json, sys, typer
from pathlib import Path
from cpcompile.cli import guard
from cpcompile.train import train
from tests.train_support import tiny_options

folder, changes = Path(sys.argv[1]), json.loads(sys.argv.pop())
paths = {name: Path(changes[name]) for name in ("save", "log") if name in changes}
options = tiny_options(folder, ranks=2, steps=1_000_000, save_every=5, apply=False, **{**changes, **paths})
sys.argv = ["train"]
typer.run(lambda: guard(lambda: train(options)))
"""


def command(folder: Path, **changes: Any) -> list[str]:
    """What trains the tiny model in `folder` on two ranks, as a process of its own."""
    tiny_options(folder)  # makes the model
    return [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), json.dumps(changes)]


def wait_for_steps(process: "subprocess.Popen[str]", count: int) -> None:
    """Read what a run prints until it has taken `count` steps."""
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith(f"step {count:>7}/"):
        assert line, process.stderr and process.stderr.read()


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank_and_no_lock(tmp_path: Path) -> None:
    import psutil

    arguments = command(tmp_path, save=str(tmp_path / "run"))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        wait_for_steps(process, 7)
        ranks = psutil.Process(process.pid).children()
        in_use = subprocess.run(
            command(tmp_path, save=str(tmp_path / "run"), resume=True), capture_output=True, text=True, cwd=ROOT
        )
        assert in_use.returncode == 2
        assert f"is in use by another run (process {process.pid} on" in in_use.stderr
        process.kill()
        began = time.monotonic()
        psutil.wait_procs(ranks, timeout=20)
        print(f"\n{time.monotonic() - began:.1f} s until the ranks of a killed launcher were gone")
        assert not [child for child in ranks if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        process.stdout and process.stdout.close()
    with locked(tmp_path / "run", print):
        assert checkpoint.load(tmp_path / "run").damaged == {}


@pytest.mark.slow
def test_ctrl_z_and_back(tmp_path: Path) -> None:
    arguments = command(tmp_path, heartbeat=3)
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    with process:
        wait_for_steps(process, 7)
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(8.0)
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(5.0)
        assert process.poll() is None
        process.terminate()
        assert process.wait(20) == 143


def joined(folder: Path, **changes: Any) -> "list[subprocess.Popen[str]]":
    """Two ranks as a launcher of others starts them: rank 0 keeps the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            command(folder, **changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=common | {"RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_of_torchrun(tmp_path: Path, stopped: int) -> None:
    processes = joined(tmp_path, heartbeat=4)
    try:
        wait_for_steps(processes[0], 3)
        os.kill(processes[stopped].pid, signal.SIGSTOP)
        began = time.monotonic()
        other = processes[1 - stopped]
        assert other.wait(30) == 2
        said = other.stderr.read() if other.stderr else ""
        print(f"\n{time.monotonic() - began:.1f} s: {said}")
        who = "rank 1" if stopped else "the store of the ranks (torchrun's, or rank 0's)"
        assert f"error: {who} gave no sign of life for 4 s; all ranks were ended." in said
        assert f"rank {1 - stopped}: the last messages" in said
        # What a rank has told the store is known as long as that answers.
        assert ("rank 1 is behind: " in said) == bool(stopped)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_sigterm_for_the_ranks_of_torchrun(tmp_path: Path) -> None:
    processes = joined(tmp_path, save=str(tmp_path / "run"))
    wait_for_steps(processes[0], 7)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [143, 143]
    step = checkpoint.load(tmp_path / "run").step
    assert f"SIGTERM: ended after step {step} of 1000000; checkpoint-{step:06d} is saved" in outputs[0][1]
    assert "SIGTERM" not in outputs[1][1]


@pytest.mark.slow
def test_a_full_disk_for_the_log_of_torchrun(tmp_path: Path) -> None:
    processes = joined(tmp_path, save=str(tmp_path / "run"), log="/dev/full")
    outputs = [process.communicate(timeout=120) for process in processes]
    assert processes[0].returncode == 2
    assert "error: --log /dev/full cannot be written: No space left on device" in outputs[0][1]
