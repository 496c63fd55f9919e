"""Machines: what `cpcompile tune` writes is read again, and is what costs are estimated with."""

from dataclasses import replace
from pathlib import Path

import pytest

from cpcompile.choose import machine
from cpcompile.choose.attention import AttentionSite, Ranks
from cpcompile.choose.cost import seconds
from cpcompile.choose.machine import H100, MACHINES, Machine, machine_named, this_machine
from cpcompile.errors import ConfigError

SITE = AttentionSite(1, 32, 8, 65536, 128, 128, 2, "cuda", is_causal=True, window=0, is_additive=False)


@pytest.mark.parametrize("name", MACHINES)
def test_is_read_as_it_was_written(name: str) -> None:
    assert Machine.of_json(MACHINES[name].to_json()) == MACHINES[name]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernels": [["flash", 1]]}'])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cpcompile tune"):
        Machine.of_json(text)


def test_a_tuned_file_is_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "machine.json"
    monkeypatch.setenv("CPCOMPILE_MACHINE", str(file))
    this_machine.cache_clear()
    assert this_machine() == H100
    slow = replace(H100, name="slow", symmetric=1e9)
    file.write_text(slow.to_json())
    this_machine.cache_clear()
    assert this_machine() == machine_named(str(file)) == slow
    file.write_text("no machine")
    this_machine.cache_clear()
    with pytest.raises(ConfigError, match="Measure again"):
        this_machine()
    this_machine.cache_clear()


def test_slower_links_and_kernels_cost_more() -> None:
    base = Ranks(8)
    links = replace(base, machine=replace(H100, symmetric=H100.symmetric / 1000))
    kernels = replace(base, machine=replace(H100, kernels=tuple((n, (a / 2, b / 2)) for n, (a, b) in H100.kernels)))
    for strategy in ("ring", "ulysses"):
        assert seconds(SITE, strategy, "zig_zag", links) > seconds(SITE, strategy, "zig_zag", base)
        assert seconds(SITE, strategy, "zig_zag", kernels) > seconds(SITE, strategy, "zig_zag", base)
    hosts = replace(base, machine=machine_named("h100", hosts=2, gpus=8))
    assert hosts.machine.ranks_of_host == 4
    assert seconds(SITE, "ulysses", "zig_zag", hosts) > seconds(SITE, "ulysses", "zig_zag", base)


def test_hosts_hold_as_many_gpus_each() -> None:
    with pytest.raises(ConfigError, match="evenly"):
        machine_named("h100", hosts=3, gpus=8)
    assert machine.machine_named("h200").memory > H100.memory
