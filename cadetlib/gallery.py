"""A page of the most anomalous images of a table, to look at before a threshold is trusted."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from PIL import Image

from cadetlib import image_files, processes
from cadetlib.score_table import Summary

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }}
body {{ margin: 2rem auto; max-width: 70rem; padding: 0 1rem }}
ol {{ list-style: none; padding: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem }}
li {{ break-inside: avoid; border-top: 4px solid #6b6b6b; padding-top: .5rem; overflow-wrap: anywhere; font-size: .85rem }}
li.flagged {{ border-color: #b34700 }}
img {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: #f2f2f2; image-rendering: {rendering} }}
b {{ display: block; font-size: 1rem }}
</style></head><body><h1>{title}</h1>
<p>{words}</p><ol>
{items}
</ol>{failures}</body></html>
"""


def _thumbnail(file: Path, side: int = 176) -> tuple[str, int]:
    """An image as the detector saw it, upright and cropped, as a data URI -> with its side, at most `side` pixels."""
    with Image.open(file) as opened:
        side = min(side, *opened.size)
    pixels = image_files.read_image(file, side).permute(1, 2, 0).numpy()
    buffer, kind = io.BytesIO(), "png" if side <= 64 else "jpeg"
    Image.fromarray(pixels).save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", side


def _shown(text: str) -> str:
    """Text fit for a page: escaped, and file names that are no Unicode made so."""
    return html.escape(processes.printable(text))


def _item(folder: Path, row: dict[str, str]) -> tuple[str, int]:
    try:
        uri, side = _thumbnail(folder / row["path"])
    except (OSError, ValueError):  # it was there when it was scored
        uri, side = "", 64
    kind, word = ("flagged", "flagged") if row["flagged"] == "True" else ("", "not flagged")
    name = _shown(row["path"])
    text = f'<li class="{kind}"><img alt="{name}" src="{uri}"><b>p = {float(row["p_value"]):.4g}</b>{word}<br>{name}</li>'
    return text, side


def page(folder: str | Path, found: Summary, threshold: float, promised: Any) -> str:
    """A page of the most anomalous images, smallest score first, that needs no other file.

    promised: the share of normal images that are flagged, as `thresholds.promised` has it.

    >>> from cadetlib import thresholds
    >>> found = Summary(n=2, flagged=1, failed=1, first_failed=[dict(path="<2>.png", error="cut")], most_anomalous=[])
    >>> text = page("images", found, 0.05, thresholds.promised(99, 0.05))
    >>> "1 of 1 images have p ≤ 0.05" in text, "&lt;2&gt;.png: cut" in text
    (True, True)
    """
    items = [_item(Path(folder), row) for row in found.most_anomalous]
    words = (
        f"{found.flagged} of {found.n - found.failed} images have p ≤ {threshold:g} and are flagged; of normal images, "
        f"{promised.expected:.2%} would be (95 of 100 calibrations: {promised.low:.2%} to {promised.high:.2%}). "
        f"Here are the {len(items)} most anomalous. "
        "An image's p-value is the share of calibration images that look at least as unusual."
    )
    failed = "".join(f"<li>{_shown(row['path'])}: {_shown(row['error'])}</li>" for row in found.first_failed)
    return _PAGE.format(
        title="The most anomalous images",
        rendering="pixelated" if items and max(side for _, side in items) <= 64 else "auto",
        words=words,
        items="\n".join(text for text, _ in items),
        failures=f"<h2>{found.failed} files could not be scored</h2><ul>{failed}</ul>" if found.failed else "",
    )
