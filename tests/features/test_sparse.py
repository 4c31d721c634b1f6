"""Sparse attention in stock pipelines, through Triton's interpreter, against masked attention in plain torch.

Small pipelines have few tokens: blocks are of 16 here. The reference is a kernel of its own. It puts the tokens of
pictures and frames in the order that is asked for, scores pairs of blocks as the rule says, masks the others, and takes
the order back.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY, build, same

from diffusers_accel import (
    AccelConfig,
    ConfigError,
    SparseConfig,
    Unsupported,
    accelerate,
    explain,
    register_attention,
    register_sparse,
    restore,
    stats,
)
from diffusers_accel.features.attention import sparse as sparse_attention
from diffusers_accel.kernels.attention import (
    KERNELS,
    SELECTORS,
    AttentionKernel,
    Carried,
    Inputs,
    KeptBlocks,
    Span,
    Sparse,
    SparseSupport,
)
from diffusers_accel.kernels.attention.recipe import Recipe
from diffusers_accel.kernels.attention.token_grid import cube
from diffusers_accel.models import adapter_for
from diffusers_accel.sessions import session_of

pytest.importorskip("triton")
BLOCK = 16
EXACT = Recipe(qk=None, k_block=0, pv=None)
EVERY = SparseSupport(blocks=(8, 16, 32, 64, 128, 256))
# Family -> larger pictures where one block would hold all tokens; larger blocks where there are many; the modules whose
# attention is sparse; and the grid, with the numbers of queries and keys before it, for a number of queries and keys.
SIZES = {
    "cosmos": {"height": 64, "width": 96},
    "cosmos-predict25": {"height": 64, "width": 96},
    "cosmos3": {"height": 64, "width": 96},
}
BLOCKS = {"ltx2-no-cfg": 256, "flux-kontext": 32}
SPARSE = {
    "wan": "attn1",
    "wan-vace": "attn1",
    "cosmos": "attn1",
    "cosmos-predict25": "attn1",
    "ltx2-no-cfg": "attn1",
    "cosmos3": "self_attn",
    "flux": "attn",
    "flux-kontext": "attn",
    "flux2": "attn",
    "qwen": "attn",
    "sd3": "attn",
}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """The kernel `"exact"`, which takes lists of blocks, and blocks of 16 tokens. It masks what the lists leave out, as
    the engine does."""

    def function(x):
        if x.sparse is None:
            return sdpa(x)
        lists = x.sparse.choose(x, operands(x))
        place = torch.arange(lists.indices.shape[3])
        columns = lists.indices.long().where(place < lists.counts[..., None], torch.tensor(len(place)))
        mask = torch.zeros(*lists.counts.shape, len(place) + 1, dtype=torch.bool).scatter(-1, columns, True)[..., :-1]
        mask = mask.repeat_interleave(lists.query_block, 2).repeat_interleave(lists.key_block, 3)
        return sdpa(x, mask[..., : x.query.shape[1], : x.key.shape[1]])

    monkeypatch.setitem(KERNELS._records, "exact", AttentionKernel(name="exact", load=lambda: function, sparse=EVERY))
    in_blocks(monkeypatch, BLOCK)


def operands(x):
    """The operands of a call that rounds nothing."""
    from diffusers_accel.kernels.attention.quantize import quantize

    return quantize(x, EXACT)


def by_engine(monkeypatch):
    """The engine in Triton, of any dtype, as the kernel `"exact"`."""
    from diffusers_accel.kernels.attention.low_bit import attention

    def function(x):
        if x.is_causal:
            return sdpa(x)
        return attention(x, EXACT, choose=None if x.sparse is None else x.sparse.choose)

    monkeypatch.setitem(KERNELS._records, "exact", AttentionKernel(name="exact", load=lambda: function, sparse=EVERY))


def in_blocks(monkeypatch, size):
    """Blocks of a size that no configuration may have."""

    def settings(config):
        if config.sparse is None:
            return None
        found = replace(config.sparse.resolved())
        object.__setattr__(found, "block", size)
        return found

    monkeypatch.setattr(sparse_attention, "settings", settings)


def sdpa(x: Inputs, mask=None) -> torch.Tensor:
    x = x.ungrouped()
    q, k, v = (item.transpose(1, 2) for item in (x.query, x.key, x.value))
    mask = x.attn_mask if mask is None else mask
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=x.is_causal, scale=x.scale)
    return found.transpose(1, 2)


def ordered(grid, order, block):
    """The tokens of a grid in an order, by sorting."""
    places = [(f, r, c) for f in range(grid[0]) for r in range(grid[1]) for c in range(grid[2])]
    sides = cube(grid, block)

    def key(place):
        if order == "cubes":
            return [at // side for at, side in zip(place, sides, strict=True)], place
        digits = [f"{at:08b}" for at in place]
        return "".join(frame + row + column for frame, row, column in zip(*digits, strict=True))

    numbers = {place: number for number, place in enumerate(places)}
    return torch.tensor([numbers[place] for place in (places if order == "model" else sorted(places, key=key))])


def chosen(x: Inputs, span: Span, keep: float, parts: int, block: int) -> torch.Tensor:
    """The mask of pairs of tokens that the rule of means of parts keeps."""
    query, key = (item.double().transpose(1, 2) for item in (x.query, x.ungrouped().key))
    rows, columns = -(-query.shape[2] // block), -(-key.shape[2] // block)
    means = [torch.stack([part.mean(2) for part in item.split(block // parts, 2)], 2) for item in (query, key)]
    logits = means[0] @ means[1].transpose(2, 3) * x.softmax_scale
    scores = torch.stack(
        [
            torch.stack([pair.flatten(-2).logsumexp(-1) for pair in row.split(parts, 3)], -1)
            for row in logits.split(parts, 2)
        ],
        2,
    )
    others = []
    for before, total in ((span.queries, query.shape[2]), (span.keys, key.shape[2])):
        outside = torch.tensor([not before <= at < before + span.tokens for at in range(total)])
        others.append(torch.tensor([bool(part.any()) for part in outside.split(block)]))
    scores[..., others[1]] = float("inf")
    kept = max(1, round(keep * columns))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
    mask |= others[0][:, None] | others[1][None, :]
    assert mask.shape[2:] == (rows, columns)
    return mask.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., : query.shape[2], : key.shape[2]]


def nearest(x: Inputs, span: Span, keep: float, tokens: torch.Tensor, block: int) -> torch.Tensor:
    """The mask of pairs of tokens that `"window"` keeps: the boxes around each block, in the proportions of the grid.

    Args:
        tokens: The tokens of the grid in their order, as numbers in the model's.
    """
    frames, rows, columns = span.grid
    places = torch.tensor([(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]).float()
    centers = []
    for before, total in ((span.queries, x.query.shape[1]), (span.keys, x.key.shape[1])):
        after = total - before - len(tokens)
        parts = [torch.full((before, 3), torch.nan), places[tokens], torch.full((after, 3), torch.nan)]
        centers.append(torch.stack([part.mean(0) for part in torch.cat(parts).split(block)]))
    away = (centers[0][:, None] - centers[1]).abs() / torch.tensor(span.grid).float()
    others = away.isnan().any(-1)
    scores = (-(away.amax(-1) + 1e-3 * away.sum(-1))).masked_fill(others, torch.inf)
    kept = max(1, round(keep * scores.shape[1]))
    mask = torch.zeros_like(others).scatter(1, scores.sort(dim=1, descending=True, stable=True).indices[:, :kept], True)
    mask = (mask | others).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return mask[: x.query.shape[1], : x.key.shape[1]]


def reference(monkeypatch, spans, keep, parts=4, block=BLOCK, order="model"):
    """A kernel `"reference"` that masks the calls of some lengths by the rule of means of parts, or without parts by
    `"window"`.

    Args:
        spans: Returns the place of the tokens of pictures or frames, from the numbers of queries and keys, or `None`.
    """
    masks = {}

    def function(x):
        span = spans(x.query.shape[1], x.key.shape[1])
        if span is None or x.is_causal:
            return sdpa(x)
        tokens = ordered(span.grid, order, block)
        whole = []
        for before, total in ((span.queries, x.query.shape[1]), (span.keys, x.key.shape[1])):
            rest = torch.arange(before + len(tokens), total)
            whole.append(torch.cat([torch.arange(before), tokens + before, rest]))
        moved = replace(x, query=x.query[:, whole[0]], key=x.key[:, whole[1]], value=x.value[:, whole[1]])
        if parts:
            mask = chosen(moved, span, keep, parts, block)
        else:
            mask = masks.setdefault(span, None)
            mask = masks[span] = nearest(moved, span, keep, tokens, block) if mask is None else mask
        return sdpa(moved, mask)[:, whole[0].argsort()]

    monkeypatch.setitem(KERNELS._records, "reference", AttentionKernel(name="reference", load=lambda: function))


def close(found, expected):
    found, expected = ((item,) if isinstance(item, torch.Tensor) else item for item in (found, expected))
    for one, other in zip(found, expected, strict=True):
        # Float32 sums in another order, through all layers and steps; another choice of blocks differs by far more.
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3 * float(other.abs().max()))


def place_in(name):
    """The place of the tokens of pictures and frames in a family's calls, from the sizes of its small pipeline."""
    grid = {
        "wan": (3, 3, 4), "wan-vace": (3, 3, 4), "cosmos": (2, 4, 6), "cosmos-predict25": (3, 4, 6),
        "ltx2-no-cfg": (3, 16, 16), "cosmos3": (3, 4, 6),
    }.get(name, (1, 8, 8) if name != "qwen" else (1, 4, 4))  # fmt: skip
    tokens = grid[0] * grid[1] * grid[2]

    def span(queries, keys):
        if name == "cosmos3":
            return Span(grid, 0, keys - tokens) if queries == tokens else None
        if queries != keys or queries < tokens:
            return None
        # Text comes first, but in Stable Diffusion 3; a reference picture comes last.
        before = {"sd3": 0, "flux-kontext": 16, "qwen": queries - tokens}.get(name, queries - tokens)
        return Span(grid, before, before)

    return span


@pytest.mark.parametrize("name", SPARSE)
def test_families(name, monkeypatch):
    entry, pipe, block = TINY[name], build(name), BLOCKS.get(name, BLOCK)
    order = {"flux2": "morton", "wan": "morton", "qwen": "model", "cosmos": "model"}.get(name, "cubes")
    call = {"steps": 2 if name.startswith("cosmos") else 1, **SIZES.get(name, {})}
    layers = f"*.{SPARSE[name]}"
    stock = entry.run(pipe, **call)
    # Lists by places are made once for a shape; they show whether places and order are right.
    rule, parts = ("sub-blocks", 4) if name in ("wan", "flux") else ("window", 0)
    reference(monkeypatch, place_in(name), 0.34, parts, block, order)
    accelerate(pipe, attention={"backend": "sdpa", "layers": {layers: "reference"}})
    expected = entry.run(pipe, **call)
    assert not same(expected, stock)
    in_blocks(monkeypatch, block)
    if name in ("wan", "flux"):
        by_engine(monkeypatch)
    sparse = {"selector": rule, "keep": 0.34, "min_tokens": 1, "order": order}
    accelerate(pipe, attention={"backend": "sdpa", "layers": {layers: "exact"}, "sparse": sparse})
    close(entry.run(pipe, **call), expected)
    counts = stats(pipe).attention_kernels
    assert any(key.startswith("exact, ") and key.endswith("% of blocks") for key in counts), counts
    shares = stats(pipe).sparse_by_layer
    assert len(shares) and all(0 < share < 1 for share in shares.values())
    (row,) = [row for row in explain(pipe, attention={"backend": "exact", "sparse": sparse}).rows
              if row.feature == "attention"]  # fmt: skip
    words = "" if order == "model" else f" in {order} order"
    assert any(
        f"{SPARSE[name]} attends to 34% of blocks of {block} tokens{words}, chosen by {rule!r}" in note
        for note in row.notes
    )
    restore(pipe)
    assert same(entry.run(pipe, **call), stock)


@pytest.mark.parametrize(("selector", "parts"), [("means", 1), ("sub-blocks", 4)])
def test_rules(selector, parts, monkeypatch):
    entry, pipe = TINY["wan"], build("wan")
    reference(monkeypatch, place_in("wan"), 0.67, parts)
    accelerate(pipe, attention={"backend": "sdpa", "layers": {"*attn1": "reference"}})
    expected = entry.run(pipe, steps=1)
    sparse = SparseConfig(selector=selector, keep=0.67, min_tokens=1)
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
    close(entry.run(pipe, steps=1), expected)
    assert any("67% of blocks" in key for key in stats(pipe).attention_kernels)


def test_a_rule_of_the_user(monkeypatch):
    """Its scores decide; here, the blocks that are farthest away."""
    entry, pipe = TINY["wan"], build("wan")
    monkeypatch.setattr(SELECTORS, "_records", dict(SELECTORS._records))
    seen = []

    @register_sparse("farthest", parts=2)
    def farthest(blocks):
        seen.append((blocks.query_means.shape[2], blocks.key_means.shape[2], blocks.scale, blocks.grid, blocks.kept))
        assert torch.allclose(blocks.query_centers[0], torch.tensor([0.25, 0.75, 1.5]))
        at = torch.arange(-(-blocks.query_means.shape[2] // 2))
        return (at[:, None] - at).abs().double().expand(*blocks.query_means.shape[:2], -1, -1)

    def function(x):
        at = torch.arange(x.query.shape[1]) // BLOCK
        far = (at[:, None] - at).abs()
        # Of two blocks at one distance, the first: the middle block of three attends to the first.
        last = (far == far.max(-1, keepdim=True).values) & ~((at[:, None] == 1) & (at == 2))
        return sdpa(x, last)

    monkeypatch.setitem(KERNELS._records, "reference", AttentionKernel(name="reference", load=lambda: function))
    accelerate(pipe, attention={"backend": "sdpa", "layers": {"*attn1": "reference"}})
    expected = entry.run(pipe, steps=1)
    sparse = SparseConfig(selector="farthest", keep=0.3, min_tokens=1)
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
    close(entry.run(pipe, steps=1), expected)
    assert set(seen) == {(5, 5, 16**-0.5, (3, 3, 4), 1)}
    with pytest.raises(ValueError, match="parts is 0, 1, 2, 4 or 8, got 3"):
        register_sparse("odd", farthest, parts=3)
    with pytest.raises(ValueError, match="given no blocks"):
        register_attention("listed", lambda *args: args[0], sparse=EVERY)


@pytest.mark.parametrize("parts", [0, 1])
def test_a_score_of_infinity_of_a_users_rule(parts, monkeypatch):
    """It is kept beyond the number of blocks, and no number is a block without a place."""
    monkeypatch.setattr(SELECTORS, "_records", dict(SELECTORS._records))

    def rule(blocks):
        scores = torch.zeros(4, 4)
        scores[:, 1:], scores[0, 0] = float("inf"), float("nan")
        return scores.expand(1, 2, 4, 4) if parts else scores

    register_sparse("three", rule, parts=parts)
    query = torch.zeros(1, 64, 2, 16)
    sparse = Sparse(selector=SELECTORS.get("three"), amount=0.25, block=BLOCK, min_tokens=1)
    x = Inputs(query, query, query)
    lists = sparse.choose(x, operands(x))
    assert lists.counts.eq(3).all() and lists.indices[..., :3].eq(torch.tensor([1, 2, 3])).all()


def test_calls_that_stay_dense(monkeypatch):
    """Short ones, those of which all blocks would be kept, cross-attention, dense steps and layers. A kernel that
    counts is enough."""

    def function(x):
        listed.append(x.sparse is not None)
        q, k, v = (item.transpose(1, 2) for item in (x.query, x.key, x.value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, x.attn_mask, scale=x.scale).transpose(1, 2)

    listed = []
    monkeypatch.setitem(KERNELS._records, "exact", AttentionKernel(name="exact", load=lambda: function, sparse=EVERY))
    entry, pipe = TINY["wan"], build("wan")
    plain = {"backend": "exact", "cross_attention": "sdpa"}
    accelerate(pipe, attention=plain)
    dense = entry.run(pipe, steps=1)
    for sparse in ({"keep": 0.34, "min_tokens": 37}, {"keep": 0.9, "min_tokens": 1}, {"keep": 1, "min_tokens": 1}):
        accelerate(pipe, attention={**plain, "sparse": sparse})
        assert same(entry.run(pipe, steps=1), dense)
        assert set(stats(pipe).attention_kernels) == {"exact", "sdpa"} and not any(listed)
    sparse = {"keep": 0.34, "min_tokens": 1}
    accelerate(pipe, attention={**plain, "sparse": sparse})
    entry.run(pipe, steps=1)
    everywhere = stats(pipe).attention_kernels["exact, 33% of blocks"]
    assert "exact" not in stats(pipe).attention_kernels and sum(listed) == everywhere
    accelerate(pipe, attention={**plain, "sparse": sparse, "dense_layers": 0.34, "dense_backend": "exact"})
    entry.run(pipe, steps=1)
    # Two of three blocks.
    assert stats(pipe).attention_kernels["exact, 33% of blocks"] == everywhere // 3
    accelerate(pipe, attention={**plain, "sparse": sparse, "layers": {"blocks.1.attn1": "sdpa"}})
    entry.run(pipe, steps=1)
    assert stats(pipe).attention_kernels["exact, 33% of blocks"] == everywhere * 2 // 3
    accelerate(pipe, attention={**plain, "sparse": sparse, "dense_steps": 0.5, "dense_backend": "exact"})
    entry.run(pipe, steps=2)
    assert stats(pipe).attention_kernels["exact, 33% of blocks"] == everywhere


def test_what_is_refused():
    pipe = build("wan")
    with pytest.raises(Unsupported, match=r"'sdpa' takes no lists of blocks.*'sage-fp8'"):
        accelerate(pipe, attention={"backend": "sdpa", "sparse": True})
    with pytest.raises(
        Unsupported, match=r"no kernel takes lists of blocks on cpu.* in torch.float32.*'triton' on a CUDA device"
    ):
        accelerate(pipe, attention={"sparse": "auto"})
    config = AccelConfig(attention={"backend": "exact", "sparse": True}, parallel={"ring": 2})
    context = SimpleNamespace(config=config)
    accelerate(pipe, attention="sdpa")
    denoiser = SimpleNamespace(adapter=adapter_for(pipe.transformer), device="cpu", dtype=torch.float32)
    role = SimpleNamespace(
        name="attn1", head_dim=16, backends=["exact"], layers=[SimpleNamespace(path="blocks.0.attn1")]
    )
    with pytest.raises(Unsupported, match=r"parallel\.ulysses"):
        sparse_attention.refuse(context, denoiser, [role], config.attention)
    with pytest.raises(Unsupported, match=r"places of picture and video tokens in its self-attention are not known"):
        accelerate(build("auraflow"), attention={"backend": "exact", "sparse": True})
    with pytest.raises(Unsupported, match=r"attention\.sparse\.selector='sub-block'.*Did you mean 'sub-blocks'"):
        accelerate(pipe, attention={"backend": "exact", "sparse": "sub-block"})
    with pytest.raises(Unsupported, match=r"layers\['blocks\.9\.\*'\].*matches no layer that may be sparse"):
        accelerate(pipe, attention={"backend": "exact", "sparse": {"layers": {"blocks.9.*": 1.0}}})
    with pytest.raises(ConfigError, match=r"sparse\.tau: keep=0\.3 decides how many blocks already"):
        SparseConfig(keep=0.3, tau=1.0)
    with pytest.raises(ConfigError, match=r"sparse\.keep: 'skip-softmax' chooses no blocks.*keep=None"):
        SparseConfig(selector="skip-softmax", keep=0.3)
    with pytest.raises(ConfigError, match=r"'sub-blocks' has no threshold.*selector='skip-softmax'"):
        SparseConfig(threshold_scale_factor=3)
    with pytest.raises(Unsupported, match=r"top_p.*'window'.*'sub-blocks'"):
        accelerate(pipe, attention={"backend": "exact", "sparse": {"selector": "window", "top_p": 0.9}})


def test_the_automatic_rule():
    """A value that is given stays; one amount replaces another."""
    found = SparseConfig(selector="auto").resolved()
    assert found.selector != "auto" and found.dense_steps == 0.2 and found.min_tokens == 16384
    assert SparseConfig(selector="auto", min_tokens=5).resolved() == replace(found, min_tokens=5)
    other = SparseConfig(selector="auto", tau=1.5).resolved()
    assert (other.tau, other.keep, other.top_p) == (1.5, None, None)
    assert SparseConfig(keep=0.2).resolved() == SparseConfig(keep=0.2)


def test_settings_of_visual_gen():
    found = AccelConfig(attention={"sparse": {"algorithm": "vsa", "vsa_sparsity": 0.8}}).attention.sparse
    assert found == SparseConfig(selector="means", block=64, order="cubes", keep=0.2)
    sol = {
        "algorithm": "sol_attn",
        "tau": 1.5,
        "thresh_type": "diag",
        "disabled_until_timestep": 0.9,
        "dense_layers": 2,
    }
    assert AccelConfig(attention={"sparse": sol}).attention.sparse == SparseConfig(
        selector="means", block=64, order="morton", centroids=True, tau=1.5, dense_until=0.9,
        layers={"*.0.*": 1.0, "*.1.*": 1.0},
    )  # fmt: skip
    skip = {"algorithm": "skip_softmax", "threshold_scale_factor": 900, "disabled_until_timestep": 0.8}
    assert AccelConfig(attention={"sparse": skip}).attention.sparse == SparseConfig(
        selector="skip-softmax", threshold_scale_factor=900, dense_until=0.8
    )
    sparsity = {"algorithm": "skip_softmax", "target_sparsity": 0.75}
    assert AccelConfig(attention={"sparse": sparsity}).attention.sparse == SparseConfig(
        selector="skip-softmax", target_sparsity=0.75
    )
    for values, message in (
        ({"algorithm": "vsb"}, "unknown algorithm 'vsb'.*'vsa'"),
        ({"algorithm": "vsa", "vsa_sparsty": 0.8}, "unknown key 'vsa_sparsty' of 'vsa'.*'vsa_sparsity'"),
        ({"algorithm": "vsa", "vsa_sparsity": "much"}, "expected numbers of 'vsa'"),
    ):
        with pytest.raises(ConfigError, match=message):
            AccelConfig(attention={"sparse": values})


def test_dense_phases(monkeypatch):
    """The first steps by number or by noise, and the first blocks, run on the same kernel without lists."""
    listed = []

    def function(x):
        listed.append(x.sparse is not None)
        if x.sparse is not None:
            span = x.sparse.span(x.query.shape[1], x.key.shape[1])
            x.sparse._count(x, span, SimpleNamespace(even=True, counts=None))
        return sdpa(x)

    monkeypatch.setitem(KERNELS._records, "exact", AttentionKernel(name="exact", load=lambda: function, sparse=EVERY))
    entry, pipe = TINY["wan"], build("wan")
    plain = {"backend": "exact", "cross_attention": "sdpa"}
    sparse = {"keep": 0.34, "min_tokens": 1}

    def shares(**given):
        listed.clear()
        accelerate(pipe, attention={**plain, "sparse": {**sparse, **given}})
        entry.run(pipe, steps=4)
        found = stats(pipe)
        assert set(found.attention_kernels) <= {"exact", "exact, 33% of blocks", "sdpa"}
        assert sum(listed) == found.attention_kernels.get("exact, 33% of blocks", 0)
        return sum(listed) / len(listed), set(found.sparse_by_step), found

    assert shares()[:2] == (1.0, {0, 1, 2, 3})
    assert shares(dense_steps=0.5)[:2] == (0.5, {2, 3})
    sigmas = pipe.scheduler.sigmas.tolist()
    assert shares(dense_until=sigmas[1])[:2] == (0.5, {2, 3})
    assert shares(dense_until=sigmas[1] + 1e-3)[:2] == (0.75, {1, 2, 3})
    # One of three blocks.
    assert shares(dense_layers=0.3)[0] == pytest.approx(2 / 3)
    assert shares(layers={"blocks.2.*": 1.0})[0] == pytest.approx(2 / 3)
    assert "the first 50% of steps and steps with a noise level of 0.9 or more stay dense" in str(
        explain(pipe, attention={**plain, "sparse": {**sparse, "dense_steps": 0.5, "dense_until": 0.9}})
    )


@pytest.mark.parametrize("cache", [None, {"kind": "mask", "mask": [1, 1, 0, 1]}], ids=["", "cache"])
def test_a_choice_serves_several_steps(cache, monkeypatch):
    """Of each layer and branch by itself, and not beyond a request; a skipped step chooses nothing."""
    entry, pipe = TINY["wan"], build("wan")
    beside = {} if cache is None else {"cache": cache}
    masks, step, chosen_at = {}, [], []

    def clock():
        return session_of(pipe).context.clock

    def function(x):
        state = clock().current
        if x.query.shape[1] != x.key.shape[1]:
            return sdpa(x)
        place = (state.branch, len(step) % 3)
        step.append(1)
        if place not in masks or masks[place][0] != state.request or state.step - masks[place][1] >= 2:
            masks[place] = (state.request, state.step, chosen(x, place_in("wan")(36, 36), 0.34, 4, BLOCK))
            chosen_at.append((state.request, state.step, *place))
        return sdpa(x, masks[place][2])

    monkeypatch.setitem(KERNELS._records, "reference", AttentionKernel(name="reference", load=lambda: function))
    accelerate(pipe, attention={"backend": "sdpa", "layers": {"*attn1": "reference"}}, **beside)
    entry.run(pipe, steps=1)
    expected = entry.run(pipe, steps=4)
    picked = []
    scores = SELECTORS.get("sub-blocks").scores

    def noted(blocks):
        state = clock().current
        picked.append((state.request, state.step, state.branch))
        return scores(blocks)

    monkeypatch.setattr(SELECTORS, "_records", {**SELECTORS._records, "noted": replace(
        SELECTORS.get("sub-blocks"), name="noted", scores=noted)})  # fmt: skip
    sparse = {"selector": "noted", "keep": 0.34, "min_tokens": 1, "refresh": 2}
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse}, **beside)
    entry.run(pipe, steps=1)
    close(entry.run(pipe, steps=4), expected)
    first = chosen_at[0][0] - picked[0][0]
    assert [(request + first, *rest) for request, *rest in picked] == [each[:3] for each in chosen_at]
    # A skipped step computes nothing.
    assert set(stats(pipe).sparse_by_step) == ({0, 1, 2, 3} if cache is None else {0, 1, 3})
    with pytest.raises(Unsupported, match=r"refresh.*cache='pab'"):
        accelerate(pipe, attention={"backend": "exact", "sparse": sparse}, cache="pab")


def test_a_dense_request_after_a_sparse_one():
    """It is too short to be sparse, and `stats` says nothing of blocks."""
    entry, pipe = TINY["wan"], build("wan")
    sparse = {"selector": "window", "keep": 0.34, "min_tokens": 30}
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
    entry.run(pipe, steps=1)
    assert set(stats(pipe).sparse_by_step) == {0}
    entry.run(pipe, steps=1, num_frames=5)
    found = stats(pipe)
    assert not found.sparse_by_step and not found.sparse_by_layer
    assert set(found.attention_kernels) == {"exact", "sdpa"}
    entry.run(pipe, steps=1)
    assert set(stats(pipe).sparse_by_step) == {0}


def test_shares_by_layer_and_step():
    """Shares that depend on values are the counts of the lists."""
    entry, pipe = TINY["wan"], build("wan")
    sparse = {"selector": "means", "tau": 0.0, "min_tokens": 1, "layers": {"blocks.1.attn1": 0.34}, "dense_steps": 0.5}
    counts = []
    original = KeptBlocks.add

    def counting(self, layer, found, columns):
        counts.append((layer, float(found.double().mean()) / columns))
        return original(self, layer, found, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptBlocks, "add", counting)
        accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
        for steps in (1, 2):  # the first request has no sparse step
            counts.clear()
            entry.run(pipe, steps=steps)
    found = stats(pipe)
    assert set(found.sparse_by_step) == {1}
    assert found.sparse_by_layer["transformer/1.attn1"] == pytest.approx(1 / 3)
    for block in (0, 2):
        expected = [share for layer, share in counts if layer[2] == block]
        assert len(expected) == len(found.branches)
        assert found.sparse_by_layer[f"transformer/{block}.attn1"] == pytest.approx(sum(expected) / len(expected))
    assert "sparse attention" in str(found) and "by layer, in 1 steps" in str(found)


@pytest.mark.parametrize("factor", [1e-3, 35.0, 36.0])
def test_tiles_that_are_left_out(factor, monkeypatch):
    """None of 36 keys at a low threshold, which `stats` says. With a threshold of the whole maximum a call is dense."""
    monkeypatch.setitem(KERNELS._records, "triton", replace(KERNELS.get("triton"), at_least=None, dtypes=()))
    entry, pipe = TINY["wan"], build("wan")
    attention = {"backend": "triton", "cross_attention": "sdpa"}
    accelerate(pipe, attention=attention)
    dense = entry.run(pipe, steps=1)
    sparse = {"selector": "skip-softmax", "threshold_scale_factor": factor, "min_tokens": 1}
    accelerate(pipe, attention={**attention, "sparse": sparse})
    found = entry.run(pipe, steps=1)
    shares = stats(pipe).sparse_by_layer
    if factor == 36:
        assert not shares and set(stats(pipe).attention_kernels) == {"sdpa", "triton"} and same(found, dense)
        return
    assert len(shares) == 3
    assert set(stats(pipe).attention_kernels) == {"sdpa", f"triton, skip-softmax, {factor:g} / keys"}
    if factor < 1:
        close(found, dense)
        assert set(shares.values()) == {1.0}
    assert all(0 < share <= 1 for share in shares.values())


def test_the_fastest_kernel_beside_lists(monkeypatch):
    """Sparse calls run on a kernel that takes lists, the others on those of `"auto"`; layers too."""
    monkeypatch.setattr(sparse_attention, "_ENGINES", {"exact": ("exact",), "8bit": ("exact",)})
    entry, pipe = TINY["wan"], build("wan")
    sparse = {"keep": 0.34, "min_tokens": 1, "dense_layers": 0.3}
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
    expected = entry.run(pipe, steps=1)
    accelerate(pipe, attention={"sparse": sparse})
    close(entry.run(pipe, steps=1), expected)
    counts = stats(pipe).attention_kernels
    # Two of three blocks; the first block and all cross-attention are dense.
    assert counts["exact, 33% of blocks"] * 2 == counts["sdpa"] and len(counts) == 2
    # No kernel that takes lists has such heads.
    record = replace(KERNELS.get("exact"), head_dims=(64,))
    monkeypatch.setitem(KERNELS._records, "exact", record)
    with pytest.raises(Unsupported, match="no kernel takes lists of blocks"):
        accelerate(build("wan"), attention={"sparse": sparse})


def test_noise_levels_that_are_unknown(monkeypatch):
    entry, pipe = TINY["wan"], build("wan")
    monkeypatch.setattr(sparse_attention, "noise_fractions", lambda scheduler: None)
    sparse = {"selector": "window", "keep": 0.34, "min_tokens": 1, "dense_until": 0.5}
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
    with pytest.warns(UserWarning, match="does not tell its noise levels, so that every step is dense"):
        entry.run(pipe, steps=2)
    assert not stats(pipe).sparse_by_step


def test_compiled_blocks():
    entry, pipe = TINY["wan"], build("wan")
    attention = {"backend": "sdpa", "layers": {"*attn1": "exact"}, "sparse": {"keep": 0.34, "min_tokens": 1}}
    accelerate(pipe, attention=attention)
    expected = entry.run(pipe, steps=1)
    accelerate(pipe, attention=attention, compile={"backend": "eager"})
    close(entry.run(pipe, steps=1), expected)
    assert stats(pipe).attention_kernels["exact, 33% of blocks"]


def test_records():
    assert all(KERNELS.get(name).sparse for name in ("sage", "sage-fp8", "qk16pv8", "triton"))
    assert not any(KERNELS.get(name).sparse for name in ("sdpa", "fa3"))
    device = SimpleNamespace(arch=(9, 0))
    flash = SparseSupport(blocks=(64, 128), centroids=False, within_tiles=False, architectures=((9, 0),))
    assert [flash.refuses(device, *kind) for kind in ((128, False, False), (32, False, False))] == [
        None, "takes no blocks of 32 tokens"]  # fmt: skip
    assert flash.refuses(device, 128, True, False) == "takes no centroids"
    assert flash.refuses(device, 128, False, True) == "has no skip-softmax"
    assert "takes no lists of blocks on" in flash.refuses(SimpleNamespace(arch=(10, 0)), 128, False, False)
    assert KERNELS.get("triton").exact and not KERNELS.get("triton").auto
    whole = Sparse(selector=SELECTORS.get("means"), amount=0.5, block=64, min_tokens=1)
    assert (whole.kept(64), whole.kept(640), whole.kept(641), replace(whole, amount=0.01).kept(640)) == (1, 5, 6, 1)
    assert whole.label(640) == "50% of blocks" and replace(whole, rule="tau").kept(640) is None


def test_masked_calls_are_dense():
    """A rule does not see masks: it could keep blocks that are hidden."""
    sparse = Sparse(selector=SELECTORS.get("means"), amount=0.5, block=64, min_tokens=1)
    query = torch.zeros(1, 640, 2, 16)
    mask = torch.ones(1, 1, 1, 640, dtype=torch.bool)
    assert sparse.takes(Inputs(query, query, query))
    assert not sparse.takes(Inputs(query, query, query, mask))
    assert not sparse.takes(Inputs(query, query, query, is_causal=True))
    assert not sparse.takes(Inputs(query, query[:, :320], query[:, :320]))


def test_scores_of_another_shape_are_refused(monkeypatch):
    """Their blocks do not exist: a kernel would read beyond the keys."""
    monkeypatch.setattr(SELECTORS, "_records", dict(SELECTORS._records))
    query = torch.zeros(1, 64, 2, 16)
    x = Inputs(query, query, query)
    for name, scores in (
        ("wide", lambda blocks: torch.zeros(1, 2, 4, 8)),
        ("flat", lambda blocks: torch.zeros(2, 4, 4)),
        ("whole", lambda blocks: torch.zeros(1, 2, 4, 4, dtype=torch.int32)),
    ):
        register_sparse(name, scores)
        sparse = Sparse(selector=SELECTORS.get(name), amount=0.5, block=BLOCK, min_tokens=1)
        with pytest.raises(ValueError, match=rf"'{name}' returned .*must return \(1, 2, 4, 4\)"):
            sparse.choose(x, operands(x))


def drawn_clusters(monkeypatch):
    """Any order of the tokens of each head instead of clusters, whose kernels the interpreter runs slowly; a list of
    the calls."""
    from diffusers_accel.kernels.attention import clusters

    calls = []

    def drawn(query, key, block, spans):
        calls.append(spans)
        orders = []
        for x, (begin, end) in zip((query, key), spans, strict=True):
            order = torch.arange(x.shape[1]).repeat(x.shape[0], x.shape[2], 1)
            for row in order.flatten(0, 1):
                row[begin:end] = begin + torch.randperm(end - begin)
            orders.append(order.to(torch.int32))
        return tuple(orders)

    monkeypatch.setattr(clusters, "cluster", drawn)
    return calls


@pytest.mark.parametrize("name", ["wan", "ltx2-no-cfg", "flux", "qwen"])
def test_clustered_tokens(name, monkeypatch):
    """An order in each head changes nothing where all blocks are kept, beside text too."""
    in_blocks(monkeypatch, 8)
    drawn_clusters(monkeypatch)
    entry, pipe = TINY[name], build(name)
    plain = {"backend": "sdpa", "layers": {f"*{SPARSE[name]}": "exact"}}
    accelerate(pipe, attention=plain)
    dense = entry.run(pipe, steps=1)
    sparse = {"tau": -10.0, "min_tokens": 1, "order": "clusters"}
    accelerate(pipe, attention={**plain, "sparse": sparse})
    moved = []
    original = Sparse.clustered

    def clustered(self, x):
        ordered, back = original(self, x)
        moved.append(not torch.equal(ordered.query, x.query))
        return ordered, back

    monkeypatch.setattr(Sparse, "clustered", clustered)
    found = entry.run(pipe, steps=1)
    assert any(moved)
    close(found, dense)
    assert set(stats(pipe).sparse_by_step.values()) == {1.0}
    assert "clustered in each head" in str(explain(pipe, attention={**plain, "sparse": sparse}))


def test_clusters_have_no_places():
    for selector in ("window", "radial", "bands"):
        attention = {"backend": "exact", "sparse": {"selector": selector, "order": "clusters"}}
        with pytest.raises(Unsupported, match=rf"'{selector}' chooses by the places of blocks.*order='cubes'"):
            accelerate(build("wan"), attention=attention)


def test_clusters_of_an_earlier_step(monkeypatch):
    """A choice of blocks is one of an order: both serve as many steps."""
    calls = drawn_clusters(monkeypatch)
    entry, pipe = TINY["wan"], build("wan")
    sparse = {"keep": 0.34, "min_tokens": 1, "order": "clusters", "refresh": 2}
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
    entry.run(pipe, steps=4)
    # Two branches of three blocks, in two of four steps.
    assert len(calls) == 12


def test_shares_of_heads():
    """Each head keeps as many blocks as its share says."""
    query = torch.randn(2, 64, 2, 16, generator=torch.Generator().manual_seed(0))
    own = {None: ("keep", (1.0, 0.25))}
    sparse = Sparse(selector=SELECTORS.get("means"), amount=0.5, block=BLOCK, min_tokens=1, by_layer=own)
    x = Inputs(query, query, query)
    assert sparse.takes(x) and sparse.label(64) == "62% of blocks, by head"
    counts = sparse.choose(x, operands(x)).counts
    assert counts[:, 0].eq(4).all() and counts[:, 1].eq(1).all()
    one = Inputs(query[:, :, :1], query[:, :, :1], query[:, :, :1])
    with pytest.raises(ValueError, match="shares of 2 heads, and a call has 1"):
        sparse.choose(one, operands(one))


def test_shares_of_heads_in_a_pipeline():
    entry, pipe = TINY["wan"], build("wan")
    plain = {"backend": "exact", "cross_attention": "sdpa"}
    accelerate(pipe, attention={**plain, "sparse": {"keep": 0.34, "min_tokens": 1}})
    alike = entry.run(pipe, steps=1)
    # The first matching glob decides, and a layer that none matches keeps `keep`.
    heads = {"blocks.0.*": [1.0, 0.34], "*.0.*": [0.34, 0.34]}
    accelerate(pipe, attention={**plain, "sparse": {"keep": 0.34, "min_tokens": 1, "heads": heads}})
    assert not same(entry.run(pipe, steps=1), alike)
    shares = stats(pipe).sparse_by_layer
    assert shares["transformer/0.attn1"] == pytest.approx(2 / 3)
    assert shares["transformer/1.attn1"] == pytest.approx(1 / 3)
    for heads, message in (
        ({"*attn1": [0.5]}, r"1 shares are given, and blocks.0.attn1 has 2 heads"),
        ({"*attn3": [0.5, 0.5]}, r"heads\['\*attn3'\].*matches no layer"),
    ):
        with pytest.raises(Unsupported, match=message):
            accelerate(pipe, attention={**plain, "sparse": {"heads": heads}})
    config = AccelConfig(attention={**plain, "sparse": {"heads": {"*": [0.5, 0.5]}}}, parallel={"ulysses": 2})
    denoiser = SimpleNamespace(adapter=adapter_for(pipe.transformer), device="cpu", dtype=torch.float32)
    layer = SimpleNamespace(path="blocks.0.attn1", module=pipe.transformer.blocks[0].attn1)
    role = SimpleNamespace(name="attn1", head_dim=16, backends=["exact"], layers=[layer])
    with pytest.raises(Unsupported, match=r"parallel\.ulysses and parallel\.tp share the heads"):
        sparse_attention.refuse(SimpleNamespace(config=config), denoiser, [role], config.attention)


def noted_steps(monkeypatch, pipe):
    """The rule `"noted"`, which scores as `"means"`; the step of each of its calls."""
    monkeypatch.setattr(SELECTORS, "_records", dict(SELECTORS._records))
    steps = []

    def noted(blocks):
        steps.append(session_of(pipe).context.clock.current.step)
        return SELECTORS.get("means").scores(blocks)

    register_sparse("noted", noted)
    return steps


@pytest.mark.thorough
@pytest.mark.parametrize(("drift", "choices"), [(1e-6, [0, 1, 2, 3]), (10.0, [0]), (None, [0])])
def test_drift_of_the_latents(drift, choices, monkeypatch):
    """A choice serves steps until the latents have moved as far."""
    entry, pipe = TINY["wan"], build("wan")
    steps = noted_steps(monkeypatch, pipe)
    sparse = {"selector": "noted", "keep": 0.34, "min_tokens": 1, "refresh": 100, "drift": drift}
    attention = {"backend": "exact", "cross_attention": "sdpa", "sparse": sparse}
    accelerate(pipe, attention=attention)
    entry.run(pipe, steps=4)
    assert sorted(set(steps)) == choices
    assert "serves for 100 steps" in str(explain(pipe, attention=attention))
    until = "or until the latents have changed by"
    assert (until in str(explain(pipe, attention=attention))) == (drift is not None)


@pytest.mark.thorough
def test_drift_against_the_latents(monkeypatch):
    """The bound is on the sum of absolute changes over the sum of absolute values."""
    entry, pipe = TINY["wan"], build("wan")
    seen = []
    sparse = {"keep": 0.34, "min_tokens": 1, "drift": 10.0}
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    entry.run(pipe, steps=4)
    hook.remove()
    latents = seen[::2]
    changes = [float((each - latents[0]).abs().sum() / latents[0].abs().sum()) for each in latents]
    assert changes[1] < changes[2] < changes[3]
    steps = noted_steps(monkeypatch, pipe)
    sparse = {**sparse, "selector": "noted", "drift": (changes[1] + changes[2]) / 2}
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
    entry.run(pipe, steps=4)
    assert sorted(set(steps))[:2] == [0, 2]


# As ModelOpt writes it: the coefficients are those of its example of Wan 2.2.
FITTED = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["WanAttention"],
            "ignore": ["blocks.0.*", "*attn2"],
            "threshold_scale_factor": {
                "formula": "a * exp(b * target_sparsity)",
                "coefficients": {"a": 2142.73, "b": 4.2827},
            },
            "target_sparsity": 0.25,
            "disabled_until_timestep": 0.86,
        }
    },
    "producer": {"name": "modelopt"},
}


def rule_in(pipe, **sparse):
    """The rule of self-attention, and the section that stands for it."""
    found = sparse_attention.SparseAttention(
        session_of(pipe).context.denoisers[0], SparseConfig(selector="skip-softmax", **sparse), session_of(pipe).context
    )
    roles, _ = sparse_attention_roles(found.denoiser)
    return found.of(next(role for role in roles if role.name == "attn1")), found.config


def sparse_attention_roles(denoiser):
    from diffusers_accel.config import AttentionConfig
    from diffusers_accel.features.attention.layers import roles

    return roles(denoiser, AttentionConfig(backend="sdpa"))


def test_the_calibration_of_a_checkpoint(monkeypatch):
    """Its formula, its dense steps and the modules that it leaves out; a value that is given stays."""
    pipe = build("wan")
    pipe.transformer.register_to_config(sparse_attention_config=FITTED)
    accelerate(pipe, attention="sdpa")
    rule, config = rule_in(pipe)
    own = 2142.73 * math.exp(4.2827 * 0.25)
    assert config.dense_until == 0.86 and config.threshold_scale_factor == pytest.approx(own)
    assert rule.by_layer["transformer", "attn1", 0] == ("keep", 1.0)
    for block in (1, 2):
        assert rule.by_layer["transformer", "attn1", block] == ("skip", pytest.approx(own))
    rule, config = rule_in(pipe, target_sparsity=0.75, dense_until=0.5)
    other = 2142.73 * math.exp(4.2827 * 0.75)
    assert config.dense_until == 0.5 and rule.by_layer["transformer", "attn1", 1] == ("skip", pytest.approx(other))
    rule, config = rule_in(pipe, threshold_scale_factor=900.0)
    # Modules that the checkpoint ignores stay dense.
    assert (rule.by_layer, rule.amount) == ({("transformer", "attn1", 0): ("keep", 1.0)}, 900.0)
    assert config.dense_until == 0.86
    # Files of a language model hold the coefficients of two phases, and what groups share beside them. Globs may begin
    # with the name of the component, and classes may have another name.
    older = {
        "config_groups": {
            "group_0": {
                "sparse_algo": "softmax_skip",
                "targets": ["Attention"],
                "ignore": ["transformer.blocks.1.attn1"],
            }
        },
        "threshold_scale_factor": {"prefill": {"a": 3.0, "b": 1.0}},
    }
    pipe.transformer.register_to_config(sparse_attention_config=older)
    rule, config = rule_in(pipe, target_sparsity=0.5)
    assert config.threshold_scale_factor == pytest.approx(3 * math.exp(0.5))
    assert rule.by_layer["transformer", "attn1", 1] == ("keep", 1.0)
    assert rule.by_layer["transformer", "attn1", 0] == ("skip", pytest.approx(3 * math.exp(0.5)))
    sparse = SparseConfig(selector="skip-softmax", target_sparsity=0.5)
    monkeypatch.setattr(sparse_attention, "settings", lambda config: config.sparse.resolved())
    said = " ".join(str(explain(pipe, attention={"backend": "exact", "sparse": sparse})).split())
    assert "calibration is for Attention; no layer of attn1" in said
    for b in (60.0, 1e6, -1e6):
        pipe.transformer.register_to_config(
            sparse_attention_config={**older, "threshold_scale_factor": {"a": 1.0, "b": b}}
        )  # fmt: skip
        with pytest.raises(Unsupported, match="not above 0 and up to"):
            rule_in(pipe, target_sparsity=0.5)
    # Without a share of its own, the default.
    assert rule_in(pipe)[1].scale_factor == 5000


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "no formula"),
        ({"config_groups": {"g": {"algorithm": "vsa", "threshold_scale_factor": 3.0}}}, "no formula"),
        ({"config_groups": {"g": {"algorithm": "skip_softmax", "threshold_scale_factor": 3.0}}}, "no formula"),
        ({"config_groups": {"g": {"algorithm": "skip_softmax", "threshold_scale_factor": 0}}}, "a factor of 0"),
        (
            {
                "config_groups": {
                    "g": {
                        "algorithm": "skip_softmax",
                        "threshold_scale_factor": {"formula": "a + b", "coefficients": {"a": 1, "b": 1}},
                    }
                }
            },
            r"not understood: ValueError: 'a \+ b'",
        ),
        (
            {
                "config_groups": {
                    "g": {"algorithm": "skip_softmax", "threshold_scale_factor": {"coefficients": {"a": 1}}}
                }
            },
            r"not understood: KeyError: 'b'",
        ),
    ],
)
def test_a_calibration_that_is_not_understood(entry, message):
    pipe = build("wan")
    if entry is not None:
        pipe.transformer.register_to_config(sparse_attention_config=entry)
    sparse = {"selector": "skip-softmax", "target_sparsity": 0.5}
    before = dict(pipe.transformer.attn_processors)
    with pytest.raises(Unsupported, match=message):
        accelerate(pipe, attention={"backend": "exact", "sparse": sparse})
    assert dict(pipe.transformer.attn_processors) == before
    for given, reason in (
        ({"target_sparsity": 0.5}, "'sub-blocks' has no threshold"),
        ({"selector": "skip-softmax", "target_sparsity": 0.5, "threshold_scale_factor": 9}, "Give one of the two"),
    ):
        with pytest.raises(ConfigError, match=reason):
            SparseConfig(**given)


def test_dense_steps_of_the_section_above_choose_nothing(monkeypatch):
    """A choice that no layer has made is not taken for one."""
    entry, pipe = TINY["wan"], build("wan")
    steps = noted_steps(monkeypatch, pipe)
    sparse = {"selector": "noted", "keep": 0.34, "min_tokens": 1, "refresh": 4}
    attention = {"backend": "sdpa", "layers": {"*attn1": "exact"}, "sparse": sparse}
    accelerate(pipe, attention={**attention, "dense_steps": 0.5, "dense_backend": "sdpa"})
    entry.run(pipe, steps=4)
    assert sorted(set(steps)) == [2]


def test_a_choice_is_of_a_shape(monkeypatch):
    """Requests of other sizes have choices, and orders, of their own."""
    drawn_clusters(monkeypatch)
    entry, pipe = TINY["wan"], build("wan")
    sparse = {"keep": 0.34, "min_tokens": 1, "refresh": 2, "order": "clusters"}
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
    for prompts in (1, 2, 1):
        entry.run(pipe, steps=2, num_videos_per_prompt=prompts)


def test_carried_choices():
    """Nothing is kept of another shape, and what is not kept is chosen."""
    carried = Carried()
    carried.choosing = False
    cpu = torch.device("cpu")
    assert carried.chooses("a", (1, 2), cpu) and not carried.chooses("a", (1, 2), cpu)
    assert carried.chooses("a", (2, 2), cpu)
    carried.branch = "other"
    assert carried.chooses("a", (1, 2), cpu)
    assert carried.kept("a", (1, 2), cpu).shape != carried.kept("a", (2, 2), cpu).shape


def test_joint_attention_and_ulysses():
    """Tokens of text and pictures come rank by rank then: blocks of text are not known."""
    pipe = build("flux")
    accelerate(pipe, attention="sdpa")
    denoiser = SimpleNamespace(adapter=adapter_for(pipe.transformer), device="cpu", dtype=torch.float32)
    role = SimpleNamespace(name="attn", backends=["exact"], head_dim=16, layers=[SimpleNamespace(path="blocks.0.attn")])
    config = AccelConfig(attention={"backend": "exact", "sparse": True}, parallel={"ulysses": 2})
    with pytest.raises(Unsupported, match="text and pictures jointly"):
        sparse_attention.refuse(SimpleNamespace(config=config), denoiser, [role], config.attention)


def test_a_grid_smaller_than_a_block():
    span = Span((1, 4, 4), 3, 3, "clusters", 32)
    assert span.chunks == ((19, 19), (19, 19))
