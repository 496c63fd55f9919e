"""Every script under examples/ runs as its documentation says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ELSEWHERE = {
    "ring_flash_attn_names.py",  # run by test_compat_ring_flash_attn.py
    "one_device.py",  # what the others import
}
COMPARED = r"steps losses differ by \d\.\de[-+]\d+, weights by \d\.\de[-+]\d+"
# Each of the others takes half a minute, and what it shows is also tested elsewhere in this folder.
QUICK = ("fsdp2.py", "lightning_module.py", "loss_curves.py")
# Arguments, and what is printed; scripts exit with 1 where the ranks differ from one device.
RUNS = {
    "axolotl_names.py": [
        (
            "--ranks 2",
            r"2 ranks, 2 to a sequence of 63 tokens .*\n +ranks: (\d\.\d+ ?)+\none device: (\d\.\d+ ?)+\nlosses differ",
        )
    ],
    "olmo_core_names.py": [
        ("", r"zig_zag: 3 ranks of 26 tokens.*\n +llama3: 3 ranks of 21 tokens.* gradients by \d\.\de-")
    ],
    "fsdp2.py": [("--ranks 2 --steps 3", r"after 3 steps losses differ by \d\.\de-\d+, weights by \d\.\de-\d+")],
    "accelerate_loop.py": [("--steps 20", COMPARED)],
    "trainer.py": [("--steps 20", COMPARED)],
    "trl_sft_packed.py": [("--steps 20", COMPARED)],
    "peft_lora.py": [("--steps 20", COMPARED)],
    "lightning_module.py": [("--steps 20", COMPARED)],
    "torchtitan_style.py": [("--steps 20", COMPARED)],
    "loss_curves.py": [("--help", "--ranks")],  # trains a language model, for minutes
}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a script as from a shell, in which no process group is known."""
    environment = {name: x for name, x in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.always
@pytest.mark.parametrize(
    ("script", "index"),
    [
        pytest.param(script, i, marks=() if script in QUICK else pytest.mark.slow)
        for script, runs in RUNS.items()
        for i in range(len(runs))
    ],
)
def test_script(script: str, index: int) -> None:
    arguments, printed = RUNS[script][index]
    done = run([str(EXAMPLES / script), *arguments.split()])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(printed, re.sub(r"\x1b\[[\d;]*m", "", done.stdout)), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None or os.geteuid() != 0, reason="network namespaces need iproute2 and root")
def test_two_hosts() -> None:
    script = ["sh", str(EXAMPLES / "two_hosts.sh"), sys.executable, str(EXAMPLES / "fsdp2.py"), "--data", "2"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(COMPARED, done.stdout), done.stdout


def test_all_scripts_find_what_they_import() -> None:
    """In one process for all: what frameworks, and cpcompile, do not have under this name any more."""
    code = "import runpy, sys; sys.path.insert(0, sys.argv[1])\nfor path in sys.argv[2:]: runpy.run_path(path)"
    scripts = sorted(str(path) for path in EXAMPLES.glob("*.py"))
    done = run(["-W", "ignore", "-c", code, str(EXAMPLES), *scripts])
    assert done.returncode == 0, done.stderr


def test_all_scripts_are_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == RUNS.keys() | ELSEWHERE
