"""The prompt cache: a prompt that was seen before needs no text encoder, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch
from offloading import on_cpu
from tiny import TINY, build, same
from tiny.components import NEGATIVE, PROMPT, pil_picture
from transformers import T5TokenizerFast

from diffusers_accel import accelerate, restore, stats
from diffusers_accel.features.offload.prompts import _digest, _key

FAMILIES = ["flux", "wan", "qwen", "ltx2", "sd3", "cosmos", "flux2-klein"]
OTHER = "objects and background"
THIRD = "camera and lighting"


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    with on_cpu(monkeypatch):
        yield


def watched(pipe):
    """A list that names the text encoder of each call from now on."""
    calls = []
    for name, item in pipe.components.items():
        if name.startswith("text_encoder") and item is not None:
            item.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    return calls


def taken(calls):
    """The calls since this was last asked."""
    found = list(calls)
    calls.clear()
    return found


def encode(pipe, prompt=PROMPT, **options):
    """FLUX.1's embeddings: of T5, of CLIP, and the places of tokens."""
    with torch.no_grad():
        return pipe.encode_prompt(prompt, None, max_sequence_length=16, **options)


def flux(**section):
    """FLUX.1 with a prompt cache, the calls of its text encoders, and a stock pipeline with the same weights."""
    pipe, stock = build("flux"), build("flux")
    calls = watched(pipe)
    accelerate(pipe, offload={"level": 3, **section})
    return pipe, calls, stock


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_of_before(name):
    entry, pipe = TINY[name], build(name)
    calls = watched(pipe)
    expected = entry.run(pipe, steps=2)
    needed = taken(calls)
    assert needed
    accelerate(pipe, offload=3)
    for known in (False, True, True):
        assert same(entry.run(pipe, steps=2), expected)
        assert taken(calls) == ([] if known else needed)
        assert bool(stats(pipe).offload["prompts"]) == known
    restore(pipe)
    assert "encode_prompt" not in vars(pipe)
    assert same(entry.run(pipe, steps=2), expected)
    assert taken(calls) == needed


def variants(name):
    """Arguments of requests that differ in what is encoded."""
    number = "num_images_per_prompt" if name in ("flux", "qwen", "sd3", "flux2-klein") else "num_videos_per_prompt"
    found = [{}, {"prompt": OTHER}, {number: 2}, {"prompt": [PROMPT, OTHER]}, {"prompt": [OTHER, PROMPT]}]
    found += [{"max_sequence_length": length} for length in ((2, 4) if name == "qwen" else (8, 12))]
    if name == "flux":
        found += [{"true_cfg_scale": 2.0, "negative_prompt": text} for text in (NEGATIVE, THIRD)]
        found += [{"prompt_2": OTHER}]
    elif name != "flux2-klein":
        found += [{"negative_prompt": THIRD}]
    if name == "ltx2":
        # Lists of prompts need lists of negative ones, as long as they are.
        found = [
            each | {"negative_prompt": [NEGATIVE] * 2} if isinstance(each.get("prompt"), list) else each
            for each in found
        ]
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_other_arguments(name):
    entry, pipe, stock = TINY[name], build(name), build(name)
    calls, requests = watched(pipe), variants(name)
    expected = [entry.run(stock, steps=2, **each) for each in requests]
    # Requests that are taken for each other would be seen: no two give the same.
    for number, one in enumerate(expected):
        for other in expected[:number]:
            one, other = (item if isinstance(item, torch.Tensor) else item[0] for item in (one, other))
            assert one.shape != other.shape or not torch.equal(one, other), requests[number]
    # With room for the VAE to decode two pictures at once: one after the other rounds otherwise.
    accelerate(pipe, offload={"level": 3, "vram": "1TiB"})
    for each, found in zip(requests, expected, strict=True):
        assert same(entry.run(pipe, steps=2, **each), found), each
        assert taken(calls), each
    for each, found in reversed(list(zip(requests, expected, strict=True))):
        assert same(entry.run(pipe, steps=2, **each), found), each
        assert not taken(calls), each


# --- what empties it -------------------------------------------------------------------------------------------------


def merged_by_hand(pipe):
    pipe.text_encoder_2.encoder.block[1].layer[0].SelfAttention.q.weight.data += 0.01


def one_row(pipe):
    embedding, token = pipe.text_encoder_2.get_input_embeddings(), pipe.tokenizer_2(PROMPT).input_ids[1]
    with torch.no_grad():
        embedding.weight[token] += 1


def one_row_of_another(pipe):
    embedding, token = pipe.text_encoder.get_input_embeddings(), pipe.tokenizer(PROMPT).input_ids[2]
    with torch.no_grad():
        embedding.weight[token, 3] = 2.0


def another_weight(pipe):
    layer = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.k
    layer.weight = torch.nn.Parameter(layer.weight.detach().flip(0), requires_grad=False)


def loaded_weights(pipe):
    pipe.text_encoder_2.load_state_dict({key: item.flip(-1) for key, item in pipe.text_encoder_2.state_dict().items()})


def another_activation(pipe):
    pipe.text_encoder_2.encoder.block[0].layer[-1].DenseReluDense.act = torch.nn.ReLU()


def another_tokenizer(pipe):
    """With as many tokens and the same settings, in another order."""
    tokens = pipe.tokenizer_2.convert_ids_to_tokens(list(range(len(pipe.tokenizer_2))))
    vocab = [(token, -3.0) for token in (*tokens[:4], *reversed(tokens[4:]))]
    before, pipe.tokenizer_2 = pipe.tokenizer_2, T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=64)
    assert len(before) == len(pipe.tokenizer_2)


def another_side(pipe):
    pipe.tokenizer_2.padding_side = "left"


def another_length(pipe):
    pipe.tokenizer_max_length = 3


@pytest.mark.parametrize(
    "change",
    [
        merged_by_hand,
        one_row,
        one_row_of_another,
        another_weight,
        loaded_weights,
        another_activation,
        another_tokenizer,
        another_side,
        another_length,
    ],
)
def test_changes(change):
    pipe, calls, stock = flux()
    before = encode(stock)
    for _ in range(2):
        assert same(encode(pipe), before)
    change(stock)
    after = encode(stock)
    assert not same(before[:2], after[:2])
    taken(calls)
    change(pipe)
    for known in (False, True):
        assert same(encode(pipe), after)
        assert bool(taken(calls)) != known


def test_a_token_more():
    pipe, calls, stock = flux()
    expected = encode(stock)
    encode(pipe)
    taken(calls)
    pipe.tokenizer_2.add_tokens(["zebra"])
    assert same(encode(pipe), expected)
    assert taken(calls)


def test_a_template_of_the_pipeline():
    """Qwen-Image puts the prompt into a text of its own."""
    pipe, stock = build("qwen"), build("qwen")
    calls = watched(pipe)
    accelerate(pipe, offload=3)
    pipe.encode_prompt, stock.encode_prompt = map(torch.no_grad(), (pipe.encode_prompt, stock.encode_prompt))
    before = stock.encode_prompt(PROMPT)
    assert same(pipe.encode_prompt(PROMPT)[:1], before[:1])
    taken(calls)
    for each in (pipe, stock):
        each.prompt_template_encode = each.prompt_template_encode.replace("color", "size")
    assert not same(before[:1], stock.encode_prompt(PROMPT)[:1])
    assert same(pipe.encode_prompt(PROMPT)[:1], stock.encode_prompt(PROMPT)[:1])
    assert taken(calls)


def test_lora():
    """Each step of an adapter's life is stock's, on the embeddings of an encoder that is streamed."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    pipe, calls, stock = flux()

    def layers(encoder):
        return [part for part in encoder.modules() if isinstance(part, LoraLayer)]

    def add(pipe, name):
        torch.manual_seed(len(name))
        settings = LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
        pipe.text_encoder_2.add_adapter(settings, name)

    def each(function):
        return lambda pipe: [function(part) for part in layers(pipe.text_encoder_2)]

    steps = {
        "add": lambda pipe: add(pipe, "one"),
        "trained": each(lambda part: part.lora_B["one"].weight.data.mul_(2)),
        "scale": each(lambda part: part.scale_layer(0.5)),
        "unscale": each(lambda part: part.unscale_layer(0.5)),
        "disable": lambda pipe: pipe.text_encoder_2.disable_adapters(),
        "enable": lambda pipe: pipe.text_encoder_2.enable_adapters(),
        "merge": each(lambda part: part.merge()),
        "unmerge": each(lambda part: part.unmerge()),
        "second": lambda pipe: add(pipe, "other"),
        "switch": lambda pipe: pipe.text_encoder_2.set_adapter("one"),
        "delete": lambda pipe: pipe.text_encoder_2.delete_adapter(["one", "other"]),
    }
    before = encode(stock)
    assert same(encode(pipe), before)
    for step, function in steps.items():
        taken(calls)
        function(stock)
        function(pipe)
        after = encode(stock)
        assert same(encode(pipe), after), step
        assert taken(calls), step
        assert same(encode(pipe), after) and not taken(calls), step
        assert step in ("merge", "unmerge", "delete") or not same(before[:1], after[:1]), step
        before = after


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_none_are_kept():
    pipe, calls, stock = flux(prompt_cache=0)
    for _ in range(2):
        assert same(encode(pipe), encode(stock))
        assert taken(calls) == ["text_encoder", "text_encoder_2"]
    assert "encode_prompt" not in vars(pipe)


def test_gradients():
    """With gradients wanted, nothing is kept, and nothing that was kept is given."""
    pipe, calls, _ = flux(stages=("transformer",))
    encode(pipe)
    taken(calls)
    for _ in range(2):
        pipe.encode_prompt(PROMPT, None, max_sequence_length=16)
        assert taken(calls)


def test_the_bound(monkeypatch):
    """Those leave first that were used least recently, and no more bytes are kept than allowed."""
    from diffusers_accel.features import offload

    made, stock = [], offload.PromptCache
    monkeypatch.setattr(offload, "PromptCache", lambda *args: made.append(stock(*args)) or made[-1])
    size = sum(item.numel() * item.element_size() for item in encode(build("flux")))
    pipe, calls, _ = flux(prompt_cache=2 * size + size // 2)
    (cache,) = made

    def known(prompt):
        encode(pipe, prompt)
        assert cache.bytes == len(cache._entries) * size <= 2 * size
        return not taken(calls)

    assert not known("a")
    assert not known("b")
    assert known("a")
    assert not known("c")  # "b" leaves
    assert known("a")
    assert known("c")
    assert not known("b")  # "a" leaves
    assert known("c")
    assert not known("a")
    assert cache.bytes == 2 * size
    kept = [leaf[0] for entry, _ in cache._entries.values() for leaf in entry]
    assert sum(item.numel() * item.element_size() for item in kept) == cache.bytes
    # One that is larger than all that may be kept makes no other leave.
    encode(pipe, ["x"] * 4)
    assert taken(calls)
    assert cache.bytes == 2 * size
    assert known("a")
    cache.clear()
    assert cache.bytes == 0


def test_too_small_for_any():
    pipe, calls, stock = flux(prompt_cache=16)
    for _ in range(2):
        assert same(encode(pipe), encode(stock))
        assert taken(calls)


def test_results_are_nobody_elses():
    """Writes to what was returned, at first or later, are not in later results."""
    pipe, calls, stock = flux()
    expected = encode(stock)
    for _ in range(3):
        found = encode(pipe)
        assert same(found, expected)
        assert [item.dtype for item in found] == [item.dtype for item in expected]
        for item in found:
            item.fill_(7)
    assert taken(calls) == ["text_encoder", "text_encoder_2"]


def test_inference_mode():
    """Embeddings that were kept under inference mode can be written to by their reader."""
    pipe, calls, stock = flux()
    with torch.inference_mode():
        pipe.encode_prompt(PROMPT, None, max_sequence_length=16)
    taken(calls)
    found = encode(pipe)
    found[0].add_(0)
    assert same(found, encode(stock))
    assert not taken(calls)


def test_arguments_by_name_and_order():
    pipe, calls, stock = flux()
    with torch.no_grad():
        pipe.encode_prompt(prompt=PROMPT, prompt_2=OTHER, max_sequence_length=16)
        taken(calls)
        found = pipe.encode_prompt(max_sequence_length=16, prompt_2=OTHER, prompt=PROMPT)
        assert not taken(calls)
        assert same(found, stock.encode_prompt(PROMPT, OTHER, max_sequence_length=16))
        found = pipe.encode_prompt(prompt=OTHER, prompt_2=PROMPT, max_sequence_length=16)
        assert taken(calls)
        assert same(found, stock.encode_prompt(OTHER, PROMPT, max_sequence_length=16))


def test_a_list_that_its_owner_changes():
    pipe, calls, stock = flux()
    prompts = [PROMPT]
    encode(pipe, prompts)
    prompts[0] = OTHER
    taken(calls)
    assert same(encode(pipe, prompts), encode(stock, [OTHER]))
    assert taken(calls)
    assert same(encode(pipe, [PROMPT]), encode(stock, [PROMPT]))
    assert not taken(calls)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures(monkeypatch):
    """Qwen-Image-Edit shows its text encoder the picture."""
    pipe, calls = build("qwen-edit"), []

    def embeddings(prompt, image, device):
        calls.append(image)
        return torch.full((1, 4, 32), float(len(calls))), torch.ones(1, 4, dtype=torch.long)

    monkeypatch.setattr(pipe, "_get_qwen_prompt_embeds", embeddings)
    accelerate(pipe, offload=3)

    def number(image):
        with torch.no_grad():
            return pipe.encode_prompt(image=image, prompt=[PROMPT], device=torch.device("cpu"))[0][0, 0, 0].item()

    one, other = pil_picture(16, 16, seed=1), pil_picture(16, 16, seed=2)
    images = [None, one, other, [one, other], [other, one], one.convert("L"), one.resize((8, 32))]
    images += [torch.ones(3, 4), torch.ones(4, 3), torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.long)]
    images += [torch.ones(3, 4, dtype=torch.bfloat16), torch.tensor(1.0), torch.tensor(2.0), torch.ones(0, 3)]
    first, second = one.convert("P"), one.convert("P")
    second.putpalette(list(reversed(first.getpalette())))
    assert first.tobytes() == second.tobytes()
    images += [first, second]
    numbers = [number(image) for image in images]
    assert numbers == list(range(1, len(images) + 1))
    assert [number(image) for image in images] == numbers
    assert number(one.copy()) == 2.0


def test_what_has_no_value():
    """Of arguments that cannot be compared, nothing is kept."""
    assert _key(object()) is None
    assert _key([PROMPT, object()]) is None
    assert _key({"a": [object()]}) is None
    assert _key(torch.Generator()) is None
    values = [None, 0, 0.0, False, "", "0", [], (), {}, [None], {"a": 1}, {"a": 2}, [["a"], "b"], [["a", "b"]]]
    assert len({_key(value) for value in values}) == len(values)


def test_samples_of_a_large_tensor():
    """T5-XXL's embeddings: in float32, the index of their last value is rounded beyond their end."""
    large = torch.zeros(32128 * 4096, dtype=torch.uint8)
    before = _digest([large])
    large[-1] = 1
    assert _digest([large]) != before
    assert _digest([torch.ones(1)]) != _digest([torch.zeros(1)])
