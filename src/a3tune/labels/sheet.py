"""A contact sheet of labels: one HTML page without script or outside address, everything from data escaped."""

import io
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from a3tune.data.images import load_image
from a3tune.labels.export import Exported, drawn, labelled
from a3tune.labels.rank import format_query
from a3tune.labels.store import LabelStore
from a3tune.machine.files import write_atomic
from a3tune.types import Labels, Sample

_SIDE = 320
"""Pixels of a picture's longer side."""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Region labels</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1.2rem; }}
figure {{ margin: 0; }}
img {{ width: 100%; height: auto; background: #000; }}
figcaption {{ overflow-wrap: anywhere; }}
small {{ color: #555; }}
</style>
</head>
<body>
<h1>Region labels</h1>
<p>{about}</p>
<main>
{figures}
</main>
</body>
</html>
"""


def write_sheet(
    store: LabelStore,
    samples: Sequence[Sample],
    out: Path,
    count: int,
    *,
    top_k: int | None = 4,
    threshold: float | None = None,
) -> Exported:
    """Write `count` samples, spread evenly over all, each with its image, the segments kept, and the query.

    Raises:
        OutputError: the file cannot be written.
    """
    step = max(1, len(samples) / count)
    chosen = [samples[int(at * step)] for at in range(min(count, len(samples)))]
    done = Exported()
    figures = []
    for sample, labels, _ in labelled(store, chosen, top_k, threshold, done):
        done.images += 1
        done.segments += len(labels.segments)
        figures.append(_figure(sample, labels, format_query(store.settings.query, sample)))
    about = f"{done.images:,} of {len(samples):,} questions; green: the regions kept, red: their boxes."
    page = _PAGE.format(about=escape(about), figures="\n".join(figures))
    write_atomic(out, page.encode("utf-8", "replace"))
    return done


def _figure(sample: Sample, labels: Labels, query: str) -> str:
    picture = drawn(load_image(sample.image), labels)
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    similar = ", ".join(f"{value:.2f}" for value in labels.similarity) or "none kept"
    truth = "" if sample.regions is None else f"; true regions: {len(sample.regions)}"
    source = f"data:image/jpeg;base64,{b64encode(data.getvalue()).decode()}"
    return (
        f'<figure><img alt="{escape(sample.prompt)}" src="{source}">'
        f"<figcaption><b>{escape(sample.prompt)}</b> {escape(sample.answer)}<br>"
        f"<small>query: {escape(query)}<br>similarity: {similar}{truth}</small></figcaption></figure>"
    )
