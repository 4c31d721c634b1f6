"""Judge a shapes checkpoint on held-out captions by reading pixels only.

Owns the measurement. For every object that a caption asks for: every pixel is named after the nearest palette colour
(object colours and background tones); the asked colour must be the leading object colour in the asked cell (image) or
anywhere in the frame (video); the mask of that colour there is compared with rendered masks of every shape over a
small search of centres and radii, and the best match must be the asked shape. In a video the mask's centroid is
followed, and its displacement must be the asked motion. A picture is right only if all of its objects are.

The judge is itself judged in every run: on ground-truth renders it must say nearly always right, and on shuffled
captions nearly always wrong.

    python benchmarks/shapes/score.py CHECKPOINT_DIR --count 200 --json OUT
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import scenes as scene_data
from scenes import COLOURS, MOTION_NAMES, PLACE_CENTRES, SHAPES, SIZES, TONES, TRAVEL, Scenes

MAX_SEQUENCE_LENGTH = 64
FRAMES = 17  # of a clip, unless its plan says otherwise
SEED_OF_HELD_OUT = 20_000
IMAGE_CALL: dict[str, Any] = {"num_inference_steps": 24}
VIDEO_CALL: dict[str, Any] = {"num_frames": FRAMES, "num_inference_steps": 24, "guidance_scale": 4.0}
CELL_REACH = 0.175  # half the side of the window that is read around a cell's centre
ENOUGH_AREA = 0.35  # share of the smallest shape's area that counts as present
MOVED = 0.4 * TRAVEL  # a displacement above this counts as a motion


def name_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Nearest palette entry of every pixel of [..., 3, height, width] in 0..1; below len(COLOURS) it is an object's."""
    palette = [*COLOURS.values(), *(colour for pair in TONES.values() for colour in pair)]
    table = torch.tensor(palette, device=pictures.device, dtype=torch.float32) / 255
    best = torch.full_like(pictures.select(-3, 0), math.inf, dtype=torch.float32)
    names = torch.zeros_like(best, dtype=torch.long)
    for index, colour in enumerate(table):
        distance = (pictures.float() - colour[:, None, None]).square().sum(-3)
        names = torch.where(distance < best, index, names)
        best = torch.minimum(distance, best)
    return names


def best_shapes(masks: torch.Tensor) -> torch.Tensor:
    """The shape whose rendered mask overlaps most (IoU) with each of [count, height, width] masks (unit: pixels).

    The search starts at the mask's bounding box; each shape is tried at nearby centres and at several radii.
    """
    count, height, width = masks.shape
    device = masks.device
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    has_row, has_column = masks.any(2), masks.any(1)
    top = torch.where(has_row, rows, height).amin(1)
    bottom = torch.where(has_row, rows, -1).amax(1) + 1
    left = torch.where(has_column, columns, width).amin(1)
    right = torch.where(has_column, columns, -1).amax(1) + 1
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    reach = (torch.maximum(right - left, bottom - top) / 2).clamp(min=2)
    best = torch.zeros(count, len(SHAPES), device=device)
    area = masks.sum((1, 2))
    for scale in (0.95, 1.02, 1.1, 1.18, 1.26):
        radius = (reach * scale)[:, None, None]
        for offset_y in (-0.08, 0.0, 0.08, 0.16):  # a triangle's centre is below the middle of its box
            for offset_x in (-0.06, 0.0, 0.06):
                x = (columns + 0.5 - middle_x[:, None])[:, None, :] / radius - offset_x
                y = (rows + 0.5 - middle_y[:, None])[:, :, None] / radius - offset_y
                inside = scene_data.shape_distances(*torch.broadcast_tensors(x, y)) < 0
                both = (inside & masks).sum((2, 3))
                either = inside.sum((2, 3)) + area - both
                best = torch.maximum(best, (both / either.clamp(min=1)).T)
    return torch.where(area > 0, best.argmax(1), -1)


def _smallest_area(size: int) -> float:
    """Pixels that the thinnest small object covers on a canvas of this size."""
    return ENOUGH_AREA * (0.9 * SIZES["small"] ** 2) * size * size


def judge_images(scenes: Scenes, pictures: torch.Tensor) -> dict[str, numpy.ndarray]:
    """Per asked object of [count, 3, size, size] pictures in 0..1: colour, shape and all; per picture: right."""
    count, size = pictures.shape[0], pictures.shape[-1]
    names = name_pixels(pictures)
    window = round(2 * CELL_REACH * size)
    pairs, masks, colour_right = [], [], []
    for index in range(count):
        for slot in range(scenes.shape.shape[1]):
            if scenes.shape[index, slot] < 0:
                continue
            place, colour = int(scenes.place[index, slot]), int(scenes.colour[index, slot])
            x = max(0, min(size - window, round(PLACE_CENTRES[place % 3] * size - window / 2)))
            y = max(0, min(size - window, round(PLACE_CENTRES[place // 3] * size - window / 2)))
            patch = names[index, y : y + window, x : x + window]
            pairs.append((index, slot))
            masks.append(patch == colour)
            counts = torch.bincount(patch.flatten(), minlength=len(COLOURS))[: len(COLOURS)].float()
            colour_right.append(((counts[colour] >= _smallest_area(size)) & (counts[colour] >= counts.max())).view(1))
    pair_index = numpy.array(pairs)
    shapes = best_shapes(torch.stack(masks)).cpu().numpy()
    colour_ok = torch.cat(colour_right).cpu().numpy()
    shape_ok = shapes == scenes.shape[pair_index[:, 0], pair_index[:, 1]]
    wrong = numpy.bincount(pair_index[:, 0], weights=~(colour_ok & shape_ok), minlength=count)
    return {"colour": colour_ok, "shape": shape_ok & colour_ok, "object": colour_ok & shape_ok, "right": wrong == 0}


def judge_videos(scenes: Scenes, videos: torch.Tensor) -> dict[str, numpy.ndarray]:
    """Per asked object of [count, 3, frames, size, size] videos in 0..1: colour, shape, motion; per video: right."""
    count, _, frames, size, _ = videos.shape
    ticks = (torch.arange(size, device=videos.device) + 0.5) / size
    rows: dict[str, list[Any]] = {"video": [], "colour": [], "motion": [], "asked": []}
    masks = []
    for index in range(count):
        names = name_pixels(videos[index].transpose(0, 1))
        for slot in range(scenes.shape.shape[1]):
            if scenes.shape[index, slot] < 0:
                continue
            mask = names == int(scenes.colour[index, slot])
            area = mask.sum((1, 2))
            present = area >= _smallest_area(size)
            weight = mask.float() / area.clamp(min=1)[:, None, None]
            track = torch.stack([(weight.sum(1) * ticks).sum(1), (weight.sum(2) * ticks).sum(1)], 1)
            # the mean of a few frames at either end is steadier than one frame
            shift = (track[-3:].mean(0) - track[:3].mean(0)) * (frames - 1) / max(1, frames - 3)
            rows["video"].append(index)
            rows["colour"].append(present.float().mean().view(1) >= 0.8)
            rows["motion"].append(shift)
            rows["asked"].append((scenes.shape[index, slot], scenes.motion[index, slot]))
            masks.append(mask[[0, frames // 2, frames - 1]])
    asked = numpy.array(rows["asked"])
    guesses = best_shapes(torch.cat(masks)).view(-1, 3).cpu().numpy()
    shape_ok = (guesses == asked[:, :1]).sum(1) >= 2  # a majority of the three frames read
    colour_ok = torch.cat(rows["colour"]).cpu().numpy()
    shifts = torch.stack(rows["motion"]).cpu().numpy()
    along_x = numpy.abs(shifts[:, 0]) > numpy.abs(shifts[:, 1])
    left_right = numpy.where(shifts[:, 0] < 0, MOTION_NAMES.index("moving left"), MOTION_NAMES.index("moving right"))
    up_down = numpy.where(shifts[:, 1] < 0, MOTION_NAMES.index("moving up"), MOTION_NAMES.index("moving down"))
    motion = numpy.where(along_x, left_right, up_down)
    motion[numpy.abs(shifts).max(1) < MOVED] = MOTION_NAMES.index("staying still")
    motion_ok = (motion == asked[:, 1]) & colour_ok
    video = numpy.array(rows["video"])

    def all_of(good: numpy.ndarray) -> numpy.ndarray:
        return numpy.bincount(video, weights=~good, minlength=count) == 0

    good = colour_ok & shape_ok & motion_ok
    return {
        "colour": colour_ok,
        "shape": shape_ok & colour_ok,
        "motion": motion_ok,
        "object": good,
        "colours and shapes right": all_of(colour_ok & shape_ok),
        "directions right": all_of(motion_ok),
        "right": all_of(good),
    }


def judge(scenes: Scenes, pictures: torch.Tensor) -> dict[str, float]:
    """Shares of right answers; pictures in 0..1 as the functions above take them."""
    results = (judge_images if scenes.kind == "image" else judge_videos)(scenes, pictures)
    return {name: round(float(values.mean()), 4) for name, values in results.items()}


def judge_the_judge(
    kind: str, count: int, size: int, device: torch.device, frames: int = FRAMES
) -> dict[str, dict[str, float]]:
    """What the measurement says of perfect pictures, with their own captions and with another's."""
    scenes, _ = scene_data.held_out_captions(kind, count, SEED_OF_HELD_OUT + 1)
    batch = 16  # the renderer holds many copies of what it draws
    parts = [
        scene_data.render(scenes.take(slice(begin, begin + batch)), size, device, frames)
        for begin in range(0, count, batch)
    ]
    pictures = torch.cat(parts) / 2 + 0.5
    shuffled = scenes.take(numpy.roll(numpy.arange(count), 1))
    return {"ground truth": judge(scenes, pictures), "shuffled captions": judge(shuffled, pictures)}


@torch.no_grad()
def reconstruction_psnr(
    vae: Any, kind: str, size: int, count: int, batch: int = 16, frames: int = FRAMES, last: int = 0
) -> float:
    """PSNR in dB of encode and decode on held-out scenes (mean squared error taken over all of them).

    With `last`, only that many frames at the end of each clip count: a causal decoder that drifts is worst there.
    """
    device, dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
    scenes, _ = scene_data.held_out_captions(kind, count, SEED_OF_HELD_OUT + 2)
    total = 0.0
    for begin in range(0, count, batch):
        pictures = scene_data.render(scenes.take(slice(begin, begin + batch)), size, device, frames)
        decoded = vae.decode(vae.encode(pictures.to(dtype)).latent_dist.mode(), return_dict=False)[0]
        error = (decoded.float().clamp(-1, 1) - pictures).div(2).square()
        total += float((error[:, :, -last:] if last else error).mean()) * len(pictures)
    return round(-10 * math.log10(max(total / count, 1e-10)), 2)


@torch.no_grad()
def generate(
    pipeline: Any, captions: list[str], size: int, seed: int, batch: int, call: dict[str, Any]
) -> torch.Tensor:
    """Pictures of the captions through the stock pipeline's own call, in 0..1, on the pipeline's device."""
    video = "Wan" in type(pipeline).__name__
    parts = []
    for begin in range(0, len(captions), batch):
        generator = torch.Generator("cpu").manual_seed(seed + begin)
        some = captions[begin : begin + batch]
        arguments = {"height": size, "width": size, "max_sequence_length": MAX_SEQUENCE_LENGTH, **call}
        if video:
            output = pipeline(some, generator=generator, output_type="pt", **arguments).frames
            output = output.transpose(1, 2)
        else:
            output = pipeline(some, generator=generator, output_type="pt", **arguments).images
        parts.append(output.float())
    return torch.cat(parts)


def load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The checkpoint through the stock class's from_pretrained."""
    from diffusers import FluxPipeline, WanPipeline

    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    classes: dict[str, Any] = {"FluxPipeline": FluxPipeline, "WanPipeline": WanPipeline}
    pipeline = classes[name].from_pretrained(folder, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def score(
    folder: Path,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    steps: int | None = None,
    batch: int = 100,
    deadline: float = math.inf,
    frames: int = FRAMES,
) -> dict[str, Any]:
    """All numbers of one checkpoint; later parts are left out once time.monotonic() passes the deadline."""
    pipeline = load_pipeline(folder, device, dtype)
    kind = "video" if "Wan" in type(pipeline).__name__ else "image"
    call = {**VIDEO_CALL, "num_frames": frames} if kind == "video" else dict(IMAGE_CALL)
    if steps is not None:
        call["num_inference_steps"] = steps
    scenes, captions = scene_data.held_out_captions(kind, count, SEED_OF_HELD_OUT)
    report: dict[str, Any] = {"count": count, "dtype": str(dtype), "call": call, "scores": {}}
    settings = [(f"{size} px", size, call) for size in sizes]
    if kind == "video":
        settings.insert(1, (f"{sizes[0]} px, guidance_scale 1", sizes[0], {**call, "guidance_scale": 1.0}))
    for position, (name, size, arguments) in enumerate(settings):
        if position and time.monotonic() > deadline:
            report["scores"][name] = "not measured: out of time"
            continue
        begin = time.monotonic()
        pictures = generate(pipeline, captions, size, 7, batch if size <= 128 else max(1, batch // 4), arguments)
        seconds = round(time.monotonic() - begin, 2)
        report["scores"][name] = {**judge(scenes, pictures), "seconds": seconds}
        print(f"score {name}: {report['scores'][name]}", flush=True)
    report["judge"] = judge_the_judge(kind, count, sizes[0], device, frames)
    vae = pipeline.vae.float()
    long = kind == "video" and frames > FRAMES
    some = min(count, 16 if long else 64)
    report["vae psnr dB"] = {
        f"{size} px": reconstruction_psnr(vae, kind, size, some, 16, frames) for size in sizes if size <= 256
    }
    if long:
        ends = {
            f"{size} px, last 8 frames": reconstruction_psnr(vae, kind, size, some, 16, frames, 8) for size in sizes
        }
        report["vae psnr dB"].update(ends)
    print(f"score judge: {report['judge']}; vae: {report['vae psnr dB']}", flush=True)
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", help="default: 128 256 for images, 128 for video")
    parser.add_argument("--frames", type=int, default=FRAMES, help="of a video")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    video = "Wan" in json.loads((options.checkpoint / "model_index.json").read_text())["_class_name"]
    sizes = tuple(options.sizes or ((128,) if video else (128, 256)))
    device = torch.device("cuda" if cuda else "cpu")
    report = score(
        options.checkpoint, options.count, device, dtype, sizes, options.steps, options.batch, frames=options.frames
    )
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
