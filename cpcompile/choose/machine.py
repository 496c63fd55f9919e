"""Machine: the GPUs and links that the cost model computes with: known ones, or this one as `cpcompile tune` measured it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from cpcompile.choose.rates import BYTES, FLASH2, MEMORY, MEMORY_H200, PRODUCTS, RANKS_OF_HOST, RATES
from cpcompile.errors import ConfigError

Rates = tuple[float, float]  # FLOP/s of forward and backward


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs of one kind, and what connects them.

    Attributes:
        name: of the GPU.
        source: where its figures come from, for people.
        kernels: the rates of attention kernels in bfloat16, by name; `other` is that of all others.
        symmetric, p2p: bytes a second and direction between two GPUs of a host, copied from shared memory or sent by NCCL.
        network: bytes a second and direction of a GPU to other hosts.
        ranks_of_host: GPUs of a host.
        memory: bytes of a GPU.
        peak: FLOP/s of dense bfloat16 products, which MFU is a share of; 0 where that is not known.
        products: FLOP/s that such products reach.
        bandwidth: bytes a second that elementwise kernels reach, those that they read and those that they write.
    """

    name: str
    source: str
    kernels: tuple[tuple[str, Rates], ...]
    symmetric: float = BYTES["symmetric"]
    p2p: float = BYTES["p2p"]
    network: float = BYTES["network"]
    ranks_of_host: int = RANKS_OF_HOST
    memory: int = 80 * 10**9
    peak: float = 0.0
    products: float = PRODUCTS["gpu"]
    bandwidth: float = MEMORY["gpu"]

    def rates(self, kernel: str) -> Rates:
        """Return the rates of a kernel."""
        return dict(self.kernels).get(kernel) or dict(self.kernels)["other"]

    def bytes_per_second(self, link: str) -> float:
        """Return the rate of a link: `symmetric`, `p2p`, `network` or `cpu`."""
        return {"symmetric": self.symmetric, "p2p": self.p2p, "network": self.network, "cpu": BYTES["cpu"]}[link]

    def to_json(self) -> str:
        """Return it as a file of `cpcompile tune` has it."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def of_json(cls, text: str) -> Machine:
        """Return what `to_json` wrote.

        Raises:
            ConfigError: it is no such text.
        """
        try:
            found: dict[str, Any] = json.loads(text)
            kernels = tuple((name, (float(forward), float(backward))) for name, (forward, backward) in found["kernels"])
            return cls(**{**found, "kernels": kernels})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"this is no machine that `cpcompile tune` wrote: {error}.") from error


_HOPPER = (*RATES.items(), ("other", FLASH2))
H100 = Machine("h100", "attention and links measured on H100 and H200 of one host", _HOPPER, peak=989e12)
MACHINES = {
    "h100": H100,
    "h200": replace(H100, name="h200", memory=141 * 10**9, bandwidth=MEMORY_H200),
    "a100": Machine(
        "a100",
        "not measured: FlashAttention 2 as its paper has it, the rest at the share of its peak that an H100 reaches",
        (("other", (190e12, 170e12)),),
        symmetric=BYTES["symmetric"] * 2 / 3,
        p2p=BYTES["p2p"] * 2 / 3,
        network=BYTES["network"] / 2,
        peak=312e12,
        products=PRODUCTS["gpu"] * 312 / 989,
        bandwidth=MEMORY["gpu"] * 2.04 / 3.35,
    ),
}


def tuned_file() -> Path:
    """Return where `cpcompile tune` keeps what it measured: $CPCOMPILE_MACHINE, or a file of the user's cache."""
    given = os.environ.get("CPCOMPILE_MACHINE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "cpcompile" / "machine.json"


@cache
def this_machine() -> Machine:
    """Return what the cost model takes this machine for: as it was measured, else an H100.

    Raises:
        ConfigError: the file is not one of `cpcompile tune`.
    """
    file = tuned_file()
    try:
        return Machine.of_json(file.read_text()) if file.exists() else H100
    except ConfigError as error:
        raise ConfigError(f"{file}: {error} Measure again with `cpcompile tune`, or remove the file.") from error


def machine_named(name: str, *, hosts: int = 1, gpus: int = 0) -> Machine:
    """Return a machine by its name, or by the path of a file of `cpcompile tune`, with `gpus` over so many hosts.

    Raises:
        ConfigError: there is no such machine, or the hosts do not divide the GPUs.
    """
    if name in MACHINES:
        found = MACHINES[name]
    elif Path(name).is_file():
        try:
            found = Machine.of_json(Path(name).read_text())
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"device={name!r}: {error}") from error
    else:
        raise ConfigError(
            f"device={name!r} is no machine: choose one of {', '.join(map(repr, MACHINES))}, or name a file that `cpcompile "
            "tune` wrote on such a machine."
        )
    if hosts < 1 or gpus % hosts:
        raise ConfigError(f"{gpus} GPUs are not on {hosts} hosts evenly.")
    return replace(found, ranks_of_host=gpus // hosts) if gpus else found
