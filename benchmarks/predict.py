"""What 8, 16 and 64 GPUs should give, from what 1, 2 and 4 gave: the model of cost of docs/results/parallel.md, its
constants taken from `benchmarks/results/parallel-*.json`, on no GPU at all.

A forward on N ranks of one machine, by Ulysses, takes

    t(N) = t(1) / N  +  bytes(N) / rate  +  2 x layers x wait  +  rest

`bytes` is what a rank sends in a forward: of each layer's query, key, value and output its tokens, but for its own
heads. `rate` is that of Wan's exchanges on four GPUs, beside which nothing runs; `wait` (for the slowest rank, at
each of the two exchanges of a layer) is what else there is of the time in which exchanges run with nothing beside them,
and `rest`, which no parallelism makes shorter (gaps between kernels, products that are too small), is what is then
missing: both on average of two and four GPUs, each beside one GPU of its own run.

Between machines a ring passes keys and values on while attention works: a turn costs what is longer of the two, and the
link is slower; then what has been found is merged, at a cost for each value of the output, which FLUX's ring of four
tells (its slower kernel of attention included). Guidance is divided first, since it costs next to nothing.

    python benchmarks/predict.py        # prints the table; benchmarks/results/predicted.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import measure

# Bytes a second that a GPU sends to another machine: a link of 400 Gb/s for each, at 90%.
BETWEEN = 45e9
# Of a GPU, in bfloat16 attention: FLUX's and Wan's, measured.
ATTENTION = 5.5e14


@dataclass(frozen=True)
class Work:
    """A model's forward.

    Attributes:
        name: Of its results.
        layers: With attention among all tokens.
        tokens: Their number.
        heads: Of attention.
        width: Channels of all heads.
        forwards: Of a request, all branches.
        guided: Whether a request has two branches.
    """

    name: str
    layers: int
    tokens: int
    heads: int
    width: int
    forwards: int
    guided: bool

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends in a forward by Ulysses."""
        return 4 * self.layers * self.tokens / ranks * self.width * 2 * (ranks - 1) / ranks


WORKS = (
    Work("flux", 57, 4608, 24, 3072, 28, False),
    Work("wan", 30, 32760, 12, 1536, 24, True),
)
# Ranks by what they share: guidance, Ulysses within a machine of eight, ring between machines.
PLANS = {
    "flux": {8: (1, 8, 1), 16: (1, 8, 2), 64: (1, 8, 8)},
    "wan": {8: (2, 4, 1), 16: (2, 4, 2), 64: (2, 4, 8)},
}


def results(name: str, ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((measure.RESULTS / f"parallel-{name}-{ranks}.json").read_text())["variants"]
    return found


@dataclass(frozen=True)
class Costs:
    """The model's constants for one work, in milliseconds and bytes a millisecond."""

    one: float
    rate: float
    wait: float
    rest: float


def rate() -> float:
    """Bytes a millisecond that a rank sends: by the kernels of Wan's exchanges on four, beside which nothing runs."""
    work, found = WORKS[1], results("wan", 4)["ulysses"]["a request on the GPU, ms"]
    return work.forwards * work.sent(4) / (found["of them, _scatter"] + found["of them, _hand_back"])


def fitted(work: Work) -> Costs:
    """From results on two and four GPUs."""
    waits, rests, sent = [], [], rate()
    for ranks in (2, 4):
        found = results(work.name, ranks)
        lone = found["ulysses"]["a request on the GPU, ms"]["exchanges alone"] / work.forwards
        waits.append((lone - work.sent(ranks) / sent) / (2 * work.layers))
        rests.append(found["ulysses"]["forward, ms"] - found["one GPU"]["forward, ms"] / ranks - lone)
    one = results(work.name, 4)["one GPU"]["forward, ms"]
    return Costs(one, sent, sum(waits) / 2, sum(rests) / 2)


def merging() -> float:
    """Milliseconds for each value of a turn's output, from FLUX's ring of four."""
    work, found = WORKS[0], results("flux", 4)
    ring, one = (found[f"{name}, a later run"] for name in ("ring", "one GPU"))
    lone = ring["a request on the GPU, ms"]["exchanges alone"] / work.forwards
    values = work.tokens / 4 * work.width
    rest: float = ring["forward, ms"] - one["forward, ms"] / 4 - fitted(work).rest - lone
    return rest / (work.layers * 4 * values)


def forward(work: Work, costs: Costs, ulysses: int, ring: int = 1) -> float:
    """Milliseconds of a forward on so many ranks."""
    ranks = ulysses * ring
    found = costs.one / ranks + costs.rest
    if ulysses > 1:
        # Ranks of one machine have 1 / ring of the tokens among them.
        found += work.sent(ulysses) / ring / costs.rate + 2 * work.layers * costs.wait
    if ring > 1:
        passed = 2 * (work.tokens / ring) * (work.width / ulysses) * 2
        attention = 4 * (work.tokens / ring) ** 2 * (work.width / ulysses) / ATTENTION * 1000
        exposed = max(0.0, passed / BETWEEN * 1000 - attention)
        values = work.tokens / ring * work.width / ulysses
        found += work.layers * ((ring - 1) * exposed + ring * values * merging())
    return found


def main() -> None:
    found: dict[str, Any] = {}
    for work in WORKS:
        costs = fitted(work)
        rows: dict[str, Any] = {}
        for ranks in (2, 4):
            measured = results(work.name, ranks)["ulysses"]["forward, ms"]
            rows[f"ulysses {ranks}"] = {
                "predicted, ms": round(forward(work, costs, ranks), 1), "measured, ms": measured
            }  # fmt: skip
        for ranks, (cfg, ulysses, ring) in PLANS[work.name].items():
            each = forward(work, costs, ulysses, ring)
            request = each * work.forwards / cfg / 1000
            alone = costs.one * work.forwards / 1000
            rows[f"{ranks} GPUs: cfg {cfg}, ulysses {ulysses}, ring {ring}"] = {
                "forward, ms": round(each, 1), "request, s": round(request, 2),
                "times one GPU": round(alone / request, 1),
            }  # fmt: skip
        constants = {
            "t(1), ms": costs.one, "rate, GB/s": round(costs.rate / 1e6), "wait, us": round(1000 * costs.wait, 1),
            "rest, ms": round(costs.rest, 2),
        }  # fmt: skip
        found[work.name] = {"constants": constants, "forwards": rows}
        print(work.name, constants)
        for name, row in rows.items():
            print("   ", name, row)
    assumed = {
        "merging, ns a value": round(1e6 * merging(), 4),
        "between machines, GB/s a GPU": BETWEEN / 1e9,
        "attention, TFLOP/s": ATTENTION / 1e12,
    }
    measure.write("predicted", {"work": "predictions, not measurements", "assumed": assumed, "works": found})


if __name__ == "__main__":
    main()
