"""A rank that dies or raises ends the run in seconds, with one line that names it."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from cpcompile.train import RankError
from cpcompile.train.events import Comparison, Event, Failed, Note, Saved, Step
from cpcompile.train.failures import exit_reason, is_timeout, root_cause
from cpcompile.train.launch import launch
from tests.train_support import tiny_options


def failed(rank: int, text: str, when: float) -> Failed:
    return Failed(rank, text, "", False, when)


def test_a_death_comes_before_the_connections_it_breaks() -> None:
    lost = failed(0, "failed with RuntimeError: Connection closed by peer", 1.0)
    death = failed(1, "was killed by SIGKILL", 2.0)
    assert root_cause([lost, death]) is death


def test_an_error_comes_before_the_connections_it_breaks() -> None:
    lost = failed(0, "failed with RuntimeError: [gloo] Connection reset by peer", 1.0)
    error = failed(1, "failed with KeyError: 'x'", 2.0)
    assert root_cause([lost, error]) is error


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "was killed by SIGKILL (out of memory?)"),
        (-11, "was killed by SIGSEGV"),
        (3, "ended with exit code 3 before its last step"),
    ],
)
def test_exit_reasons(code: int, words: str) -> None:
    assert exit_reason(code) == words


def test_what_looks_like_a_rank_that_does_not_come() -> None:
    assert is_timeout("failed with RuntimeError: Timed out waiting 1800000ms for recv operation to complete")
    assert is_timeout(exit_reason(-signal.SIGABRT))  # by the watchdog of NCCL
    assert not is_timeout("failed with RuntimeError: Connection closed by peer")


def ranks_alive() -> list[str]:
    """Return the names of the ranks of a training run that are still there; other tests may have processes of their own."""
    return [child.name for child in multiprocessing.active_children() if child.name.startswith("rank ")]


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    killed: list[float] = []

    def kill_second_rank(event: Event) -> None:
        if isinstance(event, Step) and not killed:
            second = next(child for child in multiprocessing.active_children() if child.name == "rank 1")
            os.kill(second.pid or 0, signal.SIGKILL)
            killed.append(time.monotonic())

    options = tiny_options(tmp_path, ranks=2, steps=1_000_000, apply=False)
    with pytest.raises(
        RankError, match=r"(?m)^rank 1 was killed by SIGKILL \(out of memory\?\); all ranks were ended\.$"
    ):
        launch(options, kill_second_rank)
    assert time.monotonic() - killed[0] < 10
    assert not ranks_alive()


def test_an_error_of_a_rank_is_one_line(tmp_path: Path) -> None:
    options = tiny_options(tmp_path, ranks=2, length=100_000, apply=False)
    with pytest.raises(RankError, match=r"(?m)^the text has \d+ tokens, fewer than one sequence of --length 100000\.$"):
        launch(options, lambda event: None)
    assert not ranks_alive()


@pytest.mark.always
def test_two_ranks_train_as_one_device(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = []

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, Comparison):
            os.kill(os.getpid(), signal.SIGUSR1)

    launch(tiny_options(tmp_path, ranks=2, steps=2, length=31, save=tmp_path / "run"), hear)
    # On SIGUSR1, each rank prints its last messages, and a line compares them.
    said = capfd.readouterr().err
    assert all(f"rank {number}: the last messages" in said for number in range(2))
    assert "ring_attention" in said or "ulysses_attention" in said or "sum_gradients" in said
    assert len([event for event in events if isinstance(event, Note) and "behind" in event.text]) == 1
    comparison = next(event for event in events if isinstance(event, Comparison))
    assert comparison.ranks.loss == pytest.approx(comparison.single.loss, rel=1e-6)
    assert comparison.ranks.grad_norms == pytest.approx(comparison.single.grad_norms, rel=1e-4)
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2]
    assert [Path(event.path).name for event in events if isinstance(event, Saved)] == ["checkpoint-000002", "model"]
