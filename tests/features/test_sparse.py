"""Sparse attention in stock pipelines, through Triton's interpreter, against masked attention in plain torch.

Small pipelines have few tokens: blocks are of 16 here. The reference is a kernel of its own, which scores pairs of
blocks as the rule says, and masks the others.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY, build, same

from diffusers_accel import (
    AccelConfig,
    SparseConfig,
    Unsupported,
    accelerate,
    explain,
    register_attention,
    register_sparse,
    restore,
    stats,
)
from diffusers_accel.features.attention import kernels
from diffusers_accel.kernels.attention import KERNELS, SELECTORS, AttentionKernel, Inputs, Sparse
from diffusers_accel.kernels.attention.recipe import Recipe
from diffusers_accel.models import adapter_for

pytest.importorskip("triton")
BLOCK = 16
# Larger pictures where one block would hold all tokens, and larger blocks where there are many.
SIZES = {"cosmos": {"height": 64, "width": 96}}
BLOCKS = {"ltx2-no-cfg": 256}
EXACT = Recipe(qk=None, k_block=0, pv=None)
FAMILIES = ("wan", "wan-vace", "cosmos", "ltx2-no-cfg")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """The kernel `"exact"`, which takes lists of blocks and any dtype, and blocks of 16 tokens."""
    from diffusers_accel.kernels.attention.low_bit import attention

    def function(x):
        return attention(x, EXACT, choose=None if x.sparse is None else x.sparse.choose)

    record = AttentionKernel(name="exact", load=lambda: function, sparse=True, mask=False, key_mask=True, causal=False)
    monkeypatch.setitem(KERNELS._records, "exact", record)
    in_blocks(monkeypatch, BLOCK)


def in_blocks(monkeypatch, size):
    monkeypatch.setattr(kernels, "Sparse", lambda **values: Sparse(**{**values, "block": size}))


def chosen(x: Inputs, keep: float, parts: int | None, block: int) -> torch.Tensor:
    """The mask of pairs of tokens that a rule keeps; `parts` of None is the window."""
    query, key = (item.double().transpose(1, 2) for item in (x.query, x.key))
    count = -(-query.shape[2] // block)
    if parts is None:
        at = torch.arange(count)
        scores = -(at[:, None] - at).abs().double().expand(*query.shape[:2], -1, -1)
    else:
        means = [
            torch.stack([part.mean(2) for part in item.split(block // parts, 2)], 2) for item in (query, key)
        ]  # fmt: skip
        logits = means[0] @ means[1].transpose(2, 3) * x.softmax_scale
        scores = torch.stack(
            [
                torch.stack([pair.flatten(-2).logsumexp(-1) for pair in row.split(parts, 3)], -1)
                for row in logits.split(parts, 2)
            ],
            2,
        )
    kept = max(1, round(keep * count))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
    return mask.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., : query.shape[2], : key.shape[2]]


def reference(monkeypatch, keep, parts, block=BLOCK):
    """A kernel `"reference"` that masks self-attention by a rule."""

    def function(x):
        mask = chosen(x, keep, parts, block)
        q, k, v = (item.transpose(1, 2) for item in (x.query, x.key, x.value))
        if x.attn_mask is not None:
            mask = mask & x.attn_mask if x.attn_mask.dtype == torch.bool else x.attn_mask.masked_fill(~mask, -1e30)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=x.scale)
        return found.transpose(1, 2)

    monkeypatch.setitem(KERNELS._records, "reference", AttentionKernel(name="reference", load=lambda: function))


def close(found, expected):
    found, expected = ((item,) if isinstance(item, torch.Tensor) else item for item in (found, expected))
    for one, other in zip(found, expected, strict=True):
        # Float32 sums in another order, through all layers and steps; another choice of blocks differs by far more.
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3 * float(other.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, monkeypatch):
    entry, pipe, block = TINY[name], build(name), BLOCKS.get(name, BLOCK)
    call = {"steps": 2 if name == "cosmos" else 1, **SIZES.get(name, {})}
    stock = entry.run(pipe, **call)
    reference(monkeypatch, 0.34, 4, block)
    accelerate(pipe, attention={"backend": "sdpa", "layers": {"*.attn1": "reference"}})
    expected = entry.run(pipe, **call)
    assert not same(expected, stock)
    in_blocks(monkeypatch, block)
    sparse = {"keep": 0.34, "min_tokens": 1}
    accelerate(pipe, attention={"backend": "sdpa", "layers": {"*.attn1": "exact"}, "sparse": sparse})
    close(entry.run(pipe, **call), expected)
    counts = stats(pipe).attention_kernels
    assert any(key.startswith("exact, ") and key.endswith("% of blocks") for key in counts), counts
    (row,) = [row for row in explain(pipe, attention={"backend": "exact", "sparse": sparse}).rows
              if row.feature == "attention"]  # fmt: skip
    assert any(
        f"attn1 attends to 34% of blocks of {block} tokens, chosen by 'sub-blocks'" in note for note in row.notes
    )
    restore(pipe)
    assert same(entry.run(pipe, **call), stock)


@pytest.mark.parametrize(("selector", "parts"), [("means", 1), ("window", None), ("sub-blocks", 4)])
def test_rules(selector, parts, monkeypatch):
    entry, pipe = TINY["wan"], build("wan")
    reference(monkeypatch, 0.67, parts)
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
    def farthest(query_means, key_means, scale):
        seen.append((query_means.shape[2], key_means.shape[2], scale))
        at = torch.arange(-(-query_means.shape[2] // 2))
        return (at[:, None] - at).abs().double().expand(*query_means.shape[:2], -1, -1)

    def function(x):
        at = torch.arange(x.query.shape[1]) // BLOCK
        far = (at[:, None] - at).abs()
        # Of two blocks at one distance, the first: the middle block of three attends to the first.
        last = (far == far.max(-1, keepdim=True).values) & ~((at[:, None] == 1) & (at == 2))
        q, k, v = (item.transpose(1, 2) for item in (x.query, x.key, x.value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, last, scale=x.scale).transpose(1, 2)

    monkeypatch.setitem(KERNELS._records, "reference", AttentionKernel(name="reference", load=lambda: function))
    accelerate(pipe, attention={"backend": "sdpa", "layers": {"*attn1": "reference"}})
    expected = entry.run(pipe, steps=1)
    sparse = SparseConfig(selector="farthest", keep=0.3, min_tokens=1)
    accelerate(pipe, attention={"backend": "exact", "cross_attention": "sdpa", "sparse": sparse})
    close(entry.run(pipe, steps=1), expected)
    assert {item[:2] for item in seen} == {(5, 5)} and seen[0][2] == 16**-0.5
    with pytest.raises(ValueError, match="parts is 1, 2, 4 or 8, got 3"):
        register_sparse("odd", farthest, parts=3)
    with pytest.raises(ValueError, match="given no blocks"):
        register_attention("listed", lambda *args: args[0], sparse=True)


def test_calls_that_stay_dense(monkeypatch):
    """Short ones, those of which all blocks would be kept, cross-attention, dense steps and layers. A kernel that
    counts is enough."""

    def function(x):
        listed.append(x.sparse is not None)
        q, k, v = (item.transpose(1, 2) for item in (x.query, x.key, x.value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, x.attn_mask, scale=x.scale).transpose(1, 2)

    listed = []
    monkeypatch.setitem(KERNELS._records, "exact", AttentionKernel(name="exact", load=lambda: function, sparse=True))
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
    for backend in ("auto", "sdpa"):
        with pytest.raises(Unsupported, match=rf"'{backend}' takes no lists of blocks.*'sage-fp8'"):
            accelerate(pipe, attention={"backend": backend, "sparse": True})
    config = AccelConfig(attention={"backend": "exact", "sparse": True}, parallel={"ring": 2})
    denoiser = SimpleNamespace(adapter=adapter_for(pipe.transformer))
    with pytest.raises(Unsupported, match=r"parallel\.ulysses"):
        kernels.refuse_sparse(
            SimpleNamespace(config=config),
            denoiser,
            [SimpleNamespace(name="attn1", backends=["exact"])],
            config.attention,
        )
    with pytest.raises(Unsupported, match=r"no self-attention over the tokens of pictures or frames"):
        accelerate(build("flux"), attention={"backend": "exact", "sparse": True})
    with pytest.raises(Unsupported, match=r"attention\.sparse\.selector='sub-block'.*Did you mean 'sub-blocks'"):
        accelerate(pipe, attention={"backend": "exact", "sparse": "sub-block"})


def test_compiled_blocks():
    entry, pipe = TINY["wan"], build("wan")
    attention = {"backend": "sdpa", "layers": {"*attn1": "exact"}, "sparse": {"keep": 0.34, "min_tokens": 1}}
    accelerate(pipe, attention=attention)
    expected = entry.run(pipe, steps=1)
    accelerate(pipe, attention=attention, compile={"backend": "eager"})
    close(entry.run(pipe, steps=1), expected)
    assert stats(pipe).attention_kernels["exact, 33% of blocks"]


def test_records():
    assert all(KERNELS.get(name).sparse for name in ("sage", "sage-fp8", "qk16pv8"))
    assert not any(KERNELS.get(name).sparse for name in ("sdpa", "fa3"))
    whole = Sparse(selector=SELECTORS.get("means"), keep=0.5, block=64, min_tokens=1)
    assert (whole.kept(64), whole.kept(640), whole.kept(641), replace(whole, keep=0.01).kept(640)) == (1, 5, 6, 1)
    assert whole.share(640) == 0.5


def test_masked_calls_are_dense():
    """A rule does not see masks: it could keep blocks that are hidden."""
    sparse = Sparse(selector=SELECTORS.get("means"), keep=0.5, block=64, min_tokens=1)
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
    data = SimpleNamespace(query=query.transpose(1, 2), key=query.transpose(1, 2))
    for name, scores in (
        ("wide", lambda q, k, scale: q.new_zeros(1, 2, 4, 8)),
        ("flat", lambda q, k, scale: q.new_zeros(2, 4, 4)),
        ("whole", lambda q, k, scale: q.new_zeros(1, 2, 4, 4, dtype=torch.int32)),
    ):
        register_sparse(name, scores)
        sparse = Sparse(selector=SELECTORS.get(name), keep=0.5, block=BLOCK, min_tokens=1)
        with pytest.raises(ValueError, match=rf"'{name}' returned .*must return \(1, 2, 4, 4\)"):
            sparse.choose(Inputs(query, query, query), data)
