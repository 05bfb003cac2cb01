"""The page's own parts as HTML: the state of a request, pictures, and where one is chosen."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from mdt_jax.demo.engine import Picture, Update
from mdt_jax.sampling.images import encode_png

FOLDER = Path(__file__).parent
CANVAS = 384  # pixels of a side, in the browser
# Pictures with shorter sides are enlarged by squares, not blurred.
_SMALL = 128
_EMPTY = '<div class="mdt-empty">The pictures will be here.</div>'


def escaped(text: str) -> str:
    """A text as HTML; its braces too, which Gradio's templates would read."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")


def data_url(png: bytes) -> str:
    """A PNG as a page can hold it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def status(text: str, done: int | None = None, total: int = 1) -> str:
    """What is being done, with a bar of how far it is; screen readers say it."""
    bar = ""
    if done is not None:
        share = round(100 * done / max(total, 1))
        bar = f'<progress max="100" value="{share}" aria-label="Progress">{share}%</progress>'
    return f'<div class="mdt-status" role="status" aria-live="polite">{escaped(text)}{bar}</div>'


def error(text: str) -> str:
    """Why there are no pictures; screen readers say it at once."""
    return f'<div class="mdt-status error" role="alert">{escaped(text)}</div>'


def progress(update: Update) -> str:
    """The state of a request that is being worked on."""
    if update.total == 1:
        return status(f"{update.note} …".capitalize(), 0)
    text = f"{update.note}: step {update.done} of {update.total}".capitalize()
    return status(text, update.done, update.total)


def previews(pictures: Sequence[UInt8[np.ndarray, "h w c"]]) -> str:
    """Pictures on their way."""
    figures = [
        _figure(data_url(encode_png(pixels, {})), pixels, f"picture {index} on its way")
        for index, pixels in enumerate(pictures)
    ]
    return _grid(figures)


def results(pictures: Sequence[Picture]) -> str:
    """Finished pictures, each with its name, the word "synthetic", and a link to its file."""
    figures = []
    for picture in pictures:
        made = b"synthetic" in picture.png
        badge = ' <span class="synthetic">synthetic</span>' if made else ""
        name = escaped(picture.name)
        # The link takes the picture that is shown: the page holds each file once.
        link = (
            f'<a href="#" download="{name}" aria-label="Download {name} as PNG" '
            "onclick=\"this.href = this.closest('figure').querySelector('img').src\">"
            "Download PNG</a>"
        )
        caption = f"<figcaption>{escaped(picture.caption)}{badge}<br>{link}</figcaption>"
        alternative = f"{picture.caption}{', synthetic' if made else ''}"
        figures.append(_figure(data_url(picture.png), picture.pixels, alternative, caption))
    return _grid(figures)


def _figure(source: str, pixels: np.ndarray, alternative: str, caption: str = "") -> str:
    height, width = pixels.shape[:2]
    small = ' class="small"' if width < _SMALL else ""
    return (
        f'<figure><img{small} src="{source}" width="{width}" height="{height}" '
        f'alt="{escaped(alternative)}">{caption}</figure>'
    )


def _grid(figures: Sequence[str]) -> str:
    few = " few" if len(figures) <= 4 else ""
    return f'<div class="mdt-pictures{few}">{"".join(figures)}</div>'


def empty() -> str:
    """The place of pictures before there are any."""
    return _EMPTY


def picture_part(part: str, side: int, paints: bool) -> str:
    """Where a picture is chosen, and marked with a brush.

    Args:
      part: its name, which no other part has.
      side: height and width of the model's pictures.
      paints: whether there is a brush.
    """
    label = "Picture to paint into" if paints else "Picture"
    size = CANVAS if side < CANVAS else side
    how = (
        f'<p class="how" id="{part}-how">Brush over what is to be painted anew. By keyboard: the '
        "arrow keys move the brush, the space bar marks.</p>"
        if paints
        else ""
    )
    what = (
        'role="application" tabindex="0" class="mdt-canvas paints" '
        f'aria-label="Brush on the picture" aria-describedby="{part}-how"'
        if paints
        else 'role="img" class="mdt-canvas unused" aria-label="The chosen picture"'
    )
    low, high = max(0.5, side / 64), max(1.0, side / 4)
    tools = (
        f"""<div class="row">
<label>Brush size <input class="mdt-brush" type="range" min="{low}" max="{high}" step="any"
value="{max(0.5, side / 16)}"></label>
<label><input class="mdt-eraser" type="checkbox"> Erase</label>
<button type="button" class="mdt-clear">Clear</button>
<button type="button" class="mdt-half">Mark the right half</button>
<button type="button" class="mdt-all">Mark all</button>
</div>"""
        if paints
        else ""
    )
    return f"""<div class="mdt-picture" id="{part}-part">
<label for="{part}-file">{label} (cropped to its middle and scaled to {side} × {side})</label>
<input class="mdt-file" id="{part}-file" type="file" accept="image/*">
<canvas {what} width="{size}" height="{size}"></canvas>
{how}{tools}
<p class="mdt-says" role="status" aria-live="polite"></p>
</div>"""


def script() -> str:
    """What makes a `picture_part` work."""
    return (FOLDER / "picture.js").read_text()


def style() -> str:
    """The page's own style."""
    return (FOLDER / "style.css").read_text()
