"""Measure: the rates of attention kernels, products, memory and links of the GPUs of this machine."""

from __future__ import annotations

import socket
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed import _symmetric_memory as symmetric
from torch.multiprocessing.spawn import start_processes

from cpcompile.choose.machine import H100, Machine, Rates
from cpcompile.runtime import kernels
from cpcompile.runtime.kernels import KernelError
from cpcompile.runtime.kernels.block import Block

HEADS, HEAD_DIM = 32, 128
REPEATS = 5
MESSAGE = 256 * 2**20  # bytes
SIDE = 8192  # of the matrices of a product
PRODUCTS_IN_A_ROW = 200  # for a GPU lowers its clock within a tenth of a second, and a step is longer
COPIED = 2**31  # bytes
Report = Callable[[str], None]


def measured_machine(length: int, network: float, report: Report) -> Machine:
    """Return this machine as it is measured.

    Args:
        length: tokens of the causal attention that kernels are timed on.
        network: bytes a second of a GPU to other hosts; 0 where that is not known.
        report: is told what is measured.
    """
    rates: dict[str, Rates] = {}
    for name in kernels.NAMES:
        report(f"measuring the kernel {name} ...")
        try:
            rates[name] = kernel_rates(name, length)
        except (KernelError, RuntimeError) as error:
            report(f"  {name} is left out: {str(error).partition('. ')[0]}")
    slowest = min(rates.values(), default=H100.rates("other"))
    count = torch.cuda.device_count()
    links, source = (H100.symmetric, H100.p2p), "those of an H100 host, as one GPU has none to measure"
    if count > 1:
        report("measuring the links between two GPUs ...")
        links, source = link_rates(), "measured between the first two GPUs"
    report("measuring products and memory ...")
    products, bandwidth = product_rate(), memory_rate()
    properties = torch.cuda.get_device_properties(0)
    return Machine(
        name=properties.name,
        source=source,
        kernels=(*rates.items(), ("other", slowest)),
        symmetric=links[0],
        p2p=links[1],
        network=network or H100.network,
        ranks_of_host=count,
        memory=properties.total_memory,
        products=products,
        bandwidth=bandwidth,
    )


def kernel_rates(name: str, length: int) -> Rates:
    """Return the FLOP/s of forward and backward of a kernel on a causal attention in bfloat16."""
    made = [torch.randn(1, HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    q, k, v, dout = made
    block = Block(HEAD_DIM**-0.5, high=0)
    out, lse = kernels.forward(q, k, v, block, name)
    flops = 4 * HEADS * HEAD_DIM * length * (length + 1) / 2
    forward = timed(lambda: kernels.forward(q, k, v, block, name))
    backward = timed(lambda: kernels.backward(dout, q, k, v, out, lse, block, name))
    return flops / forward, 2.5 * flops / backward  # five products against two


def product_rate() -> float:
    """Return the FLOP/s of dense products in bfloat16."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def products() -> None:
        for _ in range(PRODUCTS_IN_A_ROW):
            torch.mm(a, b, out=out)

    return PRODUCTS_IN_A_ROW * 2 * SIDE**3 / timed(products)


def memory_rate() -> float:
    """Return the bytes a second that a kernel reads and writes which copies memory."""
    x = torch.zeros(COPIED // 4, device="cuda")
    out = torch.empty_like(x)
    return 2 * COPIED / timed(lambda: out.copy_(x))


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds of the GPU."""
    run()
    found = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return float(median(found))


def link_rates() -> tuple[float, float]:
    """Return the bytes a second between two GPUs of this host: copied from memory that they share, and sent by NCCL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: Any = torch.multiprocessing.get_context("spawn").SimpleQueue()
    start_processes(_measure_links, args=(port, results), nprocs=2)  # type: ignore[no-untyped-call]
    found: tuple[float, float] = results.get()
    return found


def _measure_links(rank: int, port: int, results: Any) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        sent, received = (torch.empty(MESSAGE, dtype=torch.uint8, device="cuda") for _ in range(2))
        sent.zero_()

        def exchange() -> None:
            operations = [dist.P2POp(dist.isend, sent, 1 - rank), dist.P2POp(dist.irecv, received, 1 - rank)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        p2p = MESSAGE / timed(exchange)
        shared = symmetric.empty((MESSAGE,), dtype=torch.uint8, device=torch.device("cuda", rank))
        assert dist.group.WORLD is not None
        handle = symmetric.rendezvous(shared, dist.group.WORLD)
        peer = handle.get_buffer(1 - rank, (MESSAGE,), torch.uint8)
        copied = MESSAGE / timed(lambda: received.copy_(peer))
        dist.barrier()
        if rank == 0:
            results.put((copied, p2p))
    finally:
        dist.destroy_process_group()
