"""One exchange at a time, without a model: the time of Ulysses' kernels over symmetric memory, beside plain copies of
as many bytes and NCCL's collectives; and sums as tensor parallelism makes them. In CUDA graphs, microseconds each.

    torchrun --nproc-per-node 2 benchmarks/exchanges.py      # benchmarks/results/exchanges-2.json
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import measure
import ranks as several
import torch
import torch.distributed as dist

from diffusers_accel.core import symm_collectives
from diffusers_accel.core.comm import Group
from diffusers_accel.core.mesh import Mesh
from diffusers_accel.core.symm_mem import SymmetricBuffer, allocate_symm_mem
from diffusers_accel.kernels.attention.peer_writes import (
    HeadAddresses,
    Part,
    TokenAddresses,
    gather_heads,
    scatter_heads,
    scatter_tokens,
)

# Tokens of the parts of a query, heads, what the norm goes over, of FLUX.1 at 1024x1024 and Wan 1.3B at 480p.
WORKS = {"flux": ((4096, 512), 24, "head"), "wan": ((32760,), 12, "all")}
DIM, CALLS = 128, 20


def microseconds(function: Callable[[], Any], replays: int) -> float:
    """Of one call among many in a graph, on all ranks at once."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begins.record()
    for _ in range(replays):
        graph.replay()
    ends.record()
    torch.cuda.synchronize()
    return round(1000 * begins.elapsed_time(ends) / replays / CALLS, 2)


def calls(
    name: str, group: Group, buffer: SymmetricBuffer, device: str, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """The calls that are timed: name -> function."""
    streams, heads, kind = WORKS[name]
    rank, ranks = group.rank, group.size
    lengths = [length // ranks for length in streams]
    tokens, own = sum(lengths), heads // ranks

    def random(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=kind)

    query, tables = random(1, tokens, heads, DIM), [random(1, tokens, 1, DIM, kind=torch.float32) for _ in "cs"]
    weight = random(DIM if kind == "head" else heads * DIM)
    parts: list[Part] = [
        (part, weight, (cos, sin))
        for part, cos, sin in zip(*(x.split(lengths, 1) for x in (query, *tables)), strict=True)
    ]
    share, whole = (1, tokens, own, DIM), (1, tokens * ranks, own, DIM)
    small, large = share_bytes(name, ranks, dtype), share_bytes(name, ranks, dtype) * ranks
    room = [[random(*share) for _ in range(ranks)] for _ in range(3)]
    here = [HeadAddresses.of(places, query.device) for places in room]
    there = []
    for place in range(3):
        views = [buffer.peer_view(to, large * place, whole, dtype) for to in range(ranks)]
        there.append(HeadAddresses.of([each[:, tokens * rank : tokens * (rank + 1)] for each in views], query.device))
    out, back = random(*whole), random(1, tokens, heads, DIM)
    ways = TokenAddresses.of([buffer.peer_view(to, small * rank, share, dtype) for to in range(ranks)], out.device)
    come = HeadAddresses.of([buffer.peer_view(rank, small * of, share, dtype) for of in range(ranks)], out.device)
    neighbour = buffer.peer_view((rank + 1) % ranks, 0, share, dtype)
    mine = back[:, :, own * rank : own * (rank + 1)]
    everything, flat = random(1, tokens * ranks, heads * DIM), query.flatten()
    received = torch.empty_like(flat)
    three: list[list[Part]] = [[(query, None, None)], parts, parts]
    return {
        "query, key and value, to memory of this GPU": lambda: scatter_heads(list(zip(three, here, strict=True)), 1e-6),
        "query, key and value, to where they belong": lambda: scatter_heads(list(zip(three, there, strict=True)), 1e-6),
        "handed back": lambda: scatter_tokens(out, mine, ways, rank),
        "collected": lambda: gather_heads(back, come, own * rank, own),
        "barrier": buffer.barrier,
        "a plain copy of one rank's share": lambda: neighbour.copy_(room[0][0]),
        "NCCL, all to all, of one operand": lambda: dist.all_to_all_single(received, flat, group=group.handle),
        "a sum over ranks": lambda: group.all_reduce_copy(everything),
        "a sum over ranks, NCCL": lambda: dist.all_reduce(everything, group=group.handle),
    }


def sums(group: Group, device: str) -> dict[str, Callable[[], Any]]:
    """Sums of some sizes, by NCCL, and of two ranks over symmetric memory."""

    def through(x: torch.Tensor) -> torch.Tensor:
        assert group.symm_mem is not None
        return symm_collectives.all_reduce_copy(group, group.symm_mem, x)

    found: dict[str, Callable[[], Any]] = {}
    for size in (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 21, 1 << 22, 1 << 24):
        x = torch.randn(size // 4, device=device)
        if group.size == 2:
            found[f"{size >> 10} KiB, symmetric memory"] = functools.partial(through, x)
        found[f"{size >> 10} KiB, NCCL"] = functools.partial(dist.all_reduce, x, group=group.handle)
    return found


def share_bytes(name: str, ranks: int, dtype: torch.dtype) -> int:
    """The bytes of one operand that a rank sends to another."""
    streams, heads, _ = WORKS[name]
    return sum(length // ranks for length in streams) * (heads // ranks) * DIM * dtype.itemsize


def main() -> None:
    options = several.parser(__doc__, repeats=10).parse_args()
    rank, ranks, dtype = several.start(options.device)
    group = Mesh({"ulysses": ranks}, options.device).group("ulysses")
    group.symm_mem, reason = allocate_symm_mem(group, options.device)
    assert group.symm_mem is not None, reason
    buffer = group.symm_mem.next_buffer(1 << 28)
    found: dict[str, Any] = {}
    for name in options.only or WORKS:
        times = {
            what: microseconds(call, options.repeats)
            for what, call in calls(name, group, buffer, options.device, dtype).items()
        }
        megabytes = round(share_bytes(name, ranks, dtype) / 1e6, 2)
        found[name] = {"MB to each other rank, of one operand": megabytes, "microseconds": times}
        if rank == 0:
            print(name, found[name], flush=True)
    found["sums, float32"] = {
        what: microseconds(call, options.repeats) for what, call in sums(group, options.device).items()
    }
    if rank == 0:
        print(found["sums, float32"])
        work = f"exchanges alone, {dtype}, {ranks} GPUs, in CUDA graphs of {CALLS}"
        measure.write(f"exchanges-{ranks}", {"work": work, "ranks": ranks, "works": found}, options.out)
    dist.barrier()


if __name__ == "__main__":
    main()
