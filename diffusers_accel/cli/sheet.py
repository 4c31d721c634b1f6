"""Comparison sheets: rows of pictures of one size under column headings, each row with a caption, as one picture.

Small pictures are enlarged by a whole factor without smoothing, so that single pixels of a difference stay visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, GRAY = (255, 255, 255), (20, 20, 24), (110, 110, 118)
MARGIN, GAP = 32, 14
TEXT, HEADING = 19, 22  # font sizes in pixels
AMPLIFICATION = 8


@dataclass(frozen=True)
class Row:
    """One row of a sheet.

    Attributes:
        tiles: Pictures (height, width, 3) with values in [0, 1], one per column.
        caption: Text above the row; empty for none.
        note: Gray text below the caption; empty for none.
        label: Word to the left of the row; empty for none.
    """

    tiles: Sequence[NDArray[np.floating]]
    caption: str = ""
    note: str = ""
    label: str = ""


def difference(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """The amplified difference min(`AMPLIFICATION` |a - b|, 1) of two pictures with values in [0, 1]."""
    return np.clip(np.abs(a - b) * AMPLIFICATION, 0, 1)


def draw(rows: Sequence[Row], headings: Sequence[str], tile: int = 256) -> Image.Image:
    """Draws a sheet.

    Args:
        rows: The rows, from top to bottom. All tiles have the same size.
        headings: Headings, one per column.
        tile: Approximate width of a drawn tile in pixels. Tiles are enlarged by the nearest whole factor.
    """
    heading_font, font = ImageFont.load_default(size=HEADING), ImageFont.load_default(size=TEXT)
    height, width = rows[0].tiles[0].shape[:2]
    factor = max(1, round(tile / width))
    tile_height, tile_width = height * factor, width * factor
    labels = max((round(font.getlength(row.label)) + GAP for row in rows if row.label), default=0)
    columns = len(headings)
    inner = labels + columns * tile_width + (columns - 1) * GAP
    texts = [_lines(row, font, inner) for row in rows]
    line = round(TEXT * 1.4)
    heading_lines = [_wrapped(text, heading_font, tile_width) for text in headings]
    heading_line = round(HEADING * 1.3)
    top = MARGIN + max(map(len, heading_lines)) * heading_line + GAP
    # A caption begins a new group, with more space above it.
    spaces = [GAP * (1 + bool(lines)) * (index > 0) for index, lines in enumerate(texts)]
    bottom = top + sum(len(lines) * line + bool(lines) * GAP // 2 + tile_height for lines in texts) + sum(spaces)

    sheet = Image.new("RGB", (inner + 2 * MARGIN, bottom + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    lefts = [MARGIN + labels + column * (tile_width + GAP) for column in range(columns)]
    for left, heading in zip(lefts, heading_lines, strict=True):
        for index, text in enumerate(heading):
            pen.text((left, MARGIN + index * heading_line), text, fill=INK, font=heading_font)
    y = top
    for row, lines, space in zip(rows, texts, spaces, strict=True):
        y += space
        for text, colour in lines:
            pen.text((MARGIN, y), text, fill=colour, font=font)
            y += line
        y += bool(lines) * GAP // 2
        if row.label:
            pen.text((MARGIN, y + tile_height // 2), row.label, fill=GRAY, font=font, anchor="lm")
        for left, picture in zip(lefts, row.tiles, strict=True):
            sheet.paste(_enlarged(picture, factor), (left, y))
        y += tile_height
    return sheet


def _enlarged(picture: NDArray[np.floating], factor: int) -> Image.Image:
    image = Image.fromarray((np.nan_to_num(picture).clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _lines(row: Row, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[tuple[str, tuple]]:
    """(text, colour) of each line above a row."""
    return [
        (text, colour)
        for whole, colour in ((row.caption, INK), (row.note, GRAY))
        if whole
        for text in _wrapped(whole, font, width)
    ]


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text as lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
