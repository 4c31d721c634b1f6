"""Procedural captioned scenes: the data that the shapes models learn from and are judged on.

Owns the vocabulary (colours, shapes, places, motions, textures, tones), the sampling of random scenes, their English
captions, the held-out split, and the renderer. A scene is a row of small integers and a few floats; pictures are drawn
from it with anti-aliased signed distances in plain torch operations, whole batches at a time, on any device and at any
resolution (all geometry is relative to the canvas).

The held-out split is by content: a fixed hash of (colour, shape, place) for images and of (colour, shape, motion) for
videos keeps about one tuple in ten out of training altogether. `held_out_captions` makes scenes of those tuples only,
so a right picture shows that the model combines words rather than remembering scenes.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass, fields

import numpy
import torch

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 34, 40),
    "orange": (246, 138, 20),
    "yellow": (250, 222, 48),
    "green": (36, 160, 64),
    "cyan": (48, 206, 220),
    "blue": (36, 72, 214),
    "purple": (156, 44, 180),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")
SIZES: dict[str, float] = {"large": 0.155, "small": 0.098}  # radius as a share of the canvas
PLACES: tuple[str, ...] = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the center", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
PLACE_CENTRES: tuple[float, ...] = (0.18, 0.5, 0.82)  # three columns (and rows) of the grid
MOTIONS: dict[str, tuple[float, float]] = {
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
    "staying still": (0.0, 0.0),
}
TRAVEL = 0.32  # how far a moving object gets over the whole clip, as a share of the canvas
TEXTURES: tuple[str, ...] = ("plain", "striped", "checkered", "dotted", "gradient")
TONES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {  # base colour and second colour of a texture
    "dark": ((36, 38, 46), (58, 60, 70)),
    "gray": ((112, 116, 122), (136, 140, 146)),
    "beige": ((196, 182, 158), (214, 202, 182)),
    "light": ((230, 229, 224), (208, 208, 204)),
}
OPENINGS: tuple[str, ...] = ("", "", "", "a picture of ", "an image with ")
VIDEO_OPENINGS: tuple[str, ...] = ("", "", "", "a video of ", "a clip with ")
SYNONYMS: dict[str, tuple[str, ...]] = {"large": ("large", "large", "big"), "small": ("small", "small", "little")}
OBJECT_SHARES = numpy.array([0.5, 0.36, 0.14])  # of scenes with one, two and three objects
HELD_OUT_SHARE = 10  # one tuple in this many is held out

COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
SIZE_NAMES: tuple[str, ...] = tuple(SIZES)
MOTION_NAMES: tuple[str, ...] = tuple(MOTIONS)
TONE_NAMES: tuple[str, ...] = tuple(TONES)


def caption_words() -> list[str]:
    """Every word that a caption can contain (the tokenizers are built from these)."""
    texts = [*COLOUR_NAMES, *SHAPES, *PLACES, *MOTION_NAMES, *TEXTURES, *TONE_NAMES, *OPENINGS, *VIDEO_OPENINGS]
    texts += [word for words in SYNONYMS.values() for word in words] + ["a an and on the with background"]
    return sorted({word for text in texts for word in text.split()})


@dataclass
class Scenes:
    """A batch of scenes: integers index the vocabularies above; `shape == -1` marks an absent object."""

    kind: str  # "image" or "video"
    colour: numpy.ndarray  # [count, objects]
    shape: numpy.ndarray  # [count, objects]
    size: numpy.ndarray  # [count, objects]
    place: numpy.ndarray  # [count, objects]: grid cell; unused for video
    motion: numpy.ndarray  # [count, objects]: unused for images
    start: numpy.ndarray  # [count, objects, 2]: centre (x, y) in the first frame
    texture: numpy.ndarray  # [count]
    tone: numpy.ndarray  # [count]
    phase: numpy.ndarray  # [count, 2]: offset of the texture, in periods

    def __len__(self) -> int:
        return len(self.tone)

    def take(self, index: slice | numpy.ndarray) -> Scenes:
        """The chosen scenes, in the given order."""
        return Scenes(self.kind, *(getattr(self, field.name)[index] for field in fields(self)[1:]))


def is_held_out(kind: str, colour: int, shape: int, third: int) -> bool:
    """True when the tuple (third: place for images, motion for videos) never occurs in training."""
    third_name = PLACES[third] if kind == "image" else MOTION_NAMES[third]
    key = f"{kind}/{COLOUR_NAMES[colour]}/{SHAPES[shape]}/{third_name}"
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def object_tuples(kind: str, held_out: bool) -> numpy.ndarray:
    """All (colour, shape, place or motion) tuples of one side of the split, [tuples, 3]."""
    thirds = len(PLACES) if kind == "image" else len(MOTION_NAMES)
    every = itertools.product(range(len(COLOURS)), range(len(SHAPES)), range(thirds))
    return numpy.array([row for row in every if is_held_out(kind, *row) == held_out])


def _velocities(motion: numpy.ndarray) -> numpy.ndarray:
    """Displacement of each object over the whole clip, (x, y) as shares of the canvas."""
    return numpy.array(list(MOTIONS.values()))[motion] * TRAVEL


def _sample_once(kind: str, count: int, generator: numpy.random.Generator, tuples: numpy.ndarray) -> Scenes:
    """One round of proposals; scenes that break a rule (shared cell, colliding paths) are left out."""
    objects = 3 if kind == "image" else 2
    chosen = tuples[generator.integers(len(tuples), size=(count, objects))]
    colour, shape, third = chosen[..., 0], chosen[..., 1].copy(), chosen[..., 2]
    size = generator.integers(len(SIZES), size=(count, objects))
    radius = numpy.array(list(SIZES.values()))[size]
    number = 1 + generator.choice(objects, size=count, p=OBJECT_SHARES[:objects] / OBJECT_SHARES[:objects].sum())
    absent = numpy.arange(objects)[None] >= number[:, None]
    good = numpy.ones(count, bool)
    if kind == "image":
        place, motion = third, numpy.full_like(third, len(MOTIONS) - 1)
        centres = numpy.array(PLACE_CENTRES)
        start = numpy.stack([centres[place % 3], centres[place // 3]], -1)
        start = start + generator.uniform(-0.012, 0.012, start.shape)
        for first, second in itertools.combinations(range(objects), 2):
            good &= (place[:, first] != place[:, second]) | absent[:, second]
    else:
        place, motion = numpy.zeros_like(third), third
        shift = _velocities(motion)
        margin = radius[..., None] + 0.01
        low, high = margin + numpy.maximum(-shift, 0), 1 - margin - numpy.maximum(shift, 0)
        start = low + (high - low) * generator.uniform(size=low.shape)
        # one colour per object, and room between the two at every moment, so that a colour's track is its object's
        moments = numpy.linspace(0, 1, 9)[:, None, None, None]
        path = start[None] + moments * shift[None]
        distance = numpy.linalg.norm(path[:, :, 0] - path[:, :, 1], axis=-1).min(0)
        apart = (distance > 1.15 * radius.sum(1)) & (colour[:, 0] != colour[:, 1])
        good &= apart | absent[:, 1]
    shape[absent] = -1
    texture, tone = generator.integers(len(TEXTURES), size=count), generator.integers(len(TONES), size=count)
    phase = generator.uniform(size=(count, 2))
    return Scenes(kind, colour, shape, size, place, motion, start, texture, tone, phase).take(good)


def sample_scenes(kind: str, count: int, seed: int, held_out: bool = False) -> Scenes:
    """`count` random scenes of one side of the split; the same seed gives the same scenes."""
    generator = numpy.random.default_rng([seed, kind == "video", held_out])
    tuples = object_tuples(kind, held_out)
    rounds: list[Scenes] = []
    while sum(map(len, rounds)) < count:
        rounds.append(_sample_once(kind, 2 * count + 64, generator, tuples))
    merged = [numpy.concatenate([getattr(part, field.name) for part in rounds]) for field in fields(Scenes)[1:]]
    return Scenes(kind, *merged).take(slice(0, count))


def captions_of(scenes: Scenes, seed: int | None = None) -> list[str]:
    """English captions; with a seed the wording varies a little, without one it is always the plain template."""
    generator = numpy.random.default_rng(seed) if seed is not None else None
    openings = OPENINGS if scenes.kind == "image" else VIDEO_OPENINGS
    third, third_names = (scenes.place, PLACES) if scenes.kind == "image" else (scenes.motion, MOTION_NAMES)
    count, objects = scenes.shape.shape
    draws = generator.integers(60, size=(count, objects + 2)) if generator else numpy.zeros((count, objects + 2), int)
    columns = [array.tolist() for array in (scenes.colour, scenes.shape, scenes.size, third, draws)]
    captions = []
    for colours, shapes, sizes, thirds, draw, texture, tone in zip(
        *columns, scenes.texture.tolist(), scenes.tone.tolist(), strict=True
    ):
        phrases = []
        for colour, shape, size, where, variant in zip(colours, shapes, sizes, thirds, draw, strict=False):
            if shape >= 0:
                words = SYNONYMS[SIZE_NAMES[size]]
                phrases.append(
                    f"a {words[variant % len(words)]} {COLOUR_NAMES[colour]} {SHAPES[shape]} {third_names[where]}"
                )
        text = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
        comma = "," if draw[-1] % 2 == 0 else ""
        background = f"{comma} on a {TEXTURES[texture]} {TONE_NAMES[tone]} background"
        captions.append(openings[draw[-2] % len(openings)] + text + background)
    return captions


def held_out_captions(kind: str, count: int, seed: int) -> tuple[Scenes, list[str]]:
    """Scenes made only of held-out combinations, with their plain captions: what scoring asks for."""
    scenes = sample_scenes(kind, count, seed, held_out=True)
    return scenes, captions_of(scenes)


def shape_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distances to every shape of radius 1 around the origin, stacked in a new first dimension.

    x and y grow to the right and downwards; negative is inside. The unit is the shape's radius.
    """
    length = torch.sqrt(x * x + y * y + 1e-12)
    circle = length - 0.96
    square = torch.maximum(x.abs(), y.abs()) - 0.84
    # an upright equilateral triangle is the intersection of three half planes
    below = y - 0.0
    triangle = torch.maximum(below - 0.72, 0.8660 * x.abs() - 0.5 * below - 0.5)
    arm = 0.3
    cross = torch.minimum(torch.maximum(x.abs() - 0.98, y.abs() - arm), torch.maximum(x.abs() - arm, y.abs() - 0.98))
    ring = (length - 0.72).abs() - 0.25
    return torch.stack([circle, square, triangle, cross, ring])


def _background(scenes: Scenes, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Backgrounds in 0..1, [count, 3, height, width]."""
    tones = torch.tensor(list(TONES.values()), device=device, dtype=torch.float32) / 255
    pair = tones[torch.as_tensor(scenes.tone, device=device)]  # [count, 2, 3]
    phase = torch.as_tensor(scenes.phase, device=device, dtype=torch.float32)
    texture = torch.as_tensor(scenes.texture, device=device)[:, None, None]
    y = ((torch.arange(height, device=device) + 0.5) / height)[None, :, None]
    x = ((torch.arange(width, device=device) + 0.5) / width)[None, None, :]
    period = 0.25
    shift_x, shift_y = phase[:, 0, None, None] * period, phase[:, 1, None, None] * period
    softness = period * height / 6  # edges of a texture are about this many pixels' reciprocal wide
    wave_x = torch.sin(2 * torch.pi * (x + shift_x) / period)
    wave_y = torch.sin(2 * torch.pi * (y + shift_y) / period)
    stripes = torch.sin(2 * torch.pi * (x + y + shift_x) / period)
    striped = (0.5 + stripes * softness).clamp(0, 1)
    checkered = (0.5 + wave_x * wave_y * softness).clamp(0, 1)
    dotted = (0.5 + (torch.cos(torch.pi * (x + shift_x) * 2 / period) + torch.cos(torch.pi * (y + shift_y) * 2 / period)
                     - 1.2) * softness / 2).clamp(0, 1)  # fmt: skip
    gradient = (y + 0 * x).expand_as(striped)
    plain = torch.zeros_like(striped)
    amounts = torch.stack([plain, striped, checkered, dotted, gradient])
    amount = torch.gather(amounts, 0, texture[None].expand(1, -1, height, width))[0][:, None]
    return pair[:, 0, :, None, None] * (1 - amount) + pair[:, 1, :, None, None] * amount


def render(scenes: Scenes, size: int, device: torch.device | str = "cpu", frames: int = 1) -> torch.Tensor:
    """Pictures of the scenes in -1..1: [count, 3, size, size], or [count, 3, frames, size, size] for video."""
    device = torch.device(device)
    picture = _background(scenes, size, size, device)
    count, objects = scenes.shape.shape
    video = scenes.kind == "video"
    moments = torch.linspace(0, 1, frames, device=device) if video else torch.zeros(1, device=device)
    picture = picture[:, None].expand(count, len(moments), 3, size, size)
    grid = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    radii = torch.tensor(list(SIZES.values()), device=device)[torch.as_tensor(scenes.size, device=device)]
    paint = torch.tensor(list(COLOURS.values()), device=device, dtype=torch.float32) / 255
    start = torch.as_tensor(scenes.start, device=device, dtype=torch.float32)
    travel = torch.as_tensor(_velocities(scenes.motion), device=device, dtype=torch.float32)
    shape = torch.as_tensor(scenes.shape, device=device)
    colour = torch.as_tensor(scenes.colour, device=device)
    for index in range(objects):
        centre = start[:, index, None] + moments[None, :, None] * travel[:, index, None]  # [count, frames, 2]
        radius = radii[:, index, None, None, None]
        x = (grid[None, None, None, :] - centre[..., 0, None, None]) / radius
        y = (grid[None, None, :, None] - centre[..., 1, None, None]) / radius
        x, y = torch.broadcast_tensors(x, y)
        which = shape[:, index].clamp(min=0)[None, :, None, None, None].expand(1, *x.shape)
        distance = torch.gather(shape_distances(x, y), 0, which)[0] * radius * size  # in pixels
        cover = (0.5 - distance).clamp(0, 1) * (shape[:, index] >= 0)[:, None, None, None]
        ink = paint[colour[:, index]][:, None, :, None, None]
        picture = picture + (ink - picture) * cover[:, :, None]
    picture = picture * 2 - 1
    return picture.transpose(1, 2).contiguous() if video else picture[:, 0].contiguous()
