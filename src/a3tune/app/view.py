"""Sessions -> HTML, PNG and JSON. Knows no Gradio; everything that a person or a model wrote is escaped here.

File names, paths and headers of images never come this far.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from a3tune.app.hidden import TITLES, Hidden
from a3tune.app.model import WHOLE, Answer, Heads
from a3tune.app.regions import ChosenRegion
from a3tune.app.session import Session
from a3tune.config import EvaluationConfig
from a3tune.metrics.catalogue import SCALED, attention_metrics, describe, in_order
from a3tune.report.figures import case_panel, head_grid, scan_definition
from a3tune.report.summary import number
from a3tune.text import visible
from a3tune.vlm.heat import overlay
from a3tune.vlm.patches import paint


class Html(Markup):
    """HTML whose parts are escaped, and made visible, when they are put in; parts that are HTML stay as they are."""

    @classmethod
    def escape(cls, value: Any, /) -> "Html":
        return cls(escape(value if hasattr(value, "__html__") else visible(str(value))))


END = "(end)"
"""Stands for the token that ends an answer."""


def word(answer: Answer, row: int) -> str:
    """What a row of an answer is called."""
    if row == WHOLE:
        return "whole answer"
    return answer.tokens[row - 1].strip() or (END if row == len(answer.tokens) else "(blank)")


def words(answer: Answer, pane: int) -> Html:
    """The answer word by word, as radio buttons: arrow keys walk through it (`words.js`)."""
    choices = Html().join(
        Html('<label><input type="radio" name="words-{}" value="{}"{}><span>{}</span></label>').format(
            pane, row, Html(" checked") if row == WHOLE else "", word(answer, row)
        )
        for row in range(len(answer.tokens) + 1)
    )
    legend = "Choose a word to see where the model looked for it"
    return Html('<fieldset class="words"><legend>{}</legend>{}</fieldset>').format(legend, choices)


def heads_name(heads: Heads, answer: Answer) -> str:
    """What a choice of heads is called."""
    count = f"{int(answer.selected_LH.sum())} of {answer.selected_LH.size}"
    if isinstance(heads, tuple):
        return f"layer {heads[0] + 1}, head {heads[1] + 1}"
    return {"selected": f"the {count} heads that look at the image most", "all": "all heads"}[heads]


def notice(text: str, kind: str = "note") -> Html:
    """A line about what happened; `kind` is `note` or `error`. Read out by screen readers."""
    sign = "Error: " if kind == "error" else ""
    return Html('<p class="notice {}" role="{}">{}{}</p>').format(
        kind, "alert" if kind == "error" else "status", sign, text
    )


def scan(session: Session) -> Html:
    """The image with its region and the segments that the question picks; a box can be drawn on it."""
    picks = session.picks
    labels = [session.shown_mask(picks.mask(rank)) for rank in range(len(picks.best))] if picks else []
    width, height = session.image.size
    alt = f"{session.title or 'Your image'}, {width} by {height} pixels"
    if session.region is not None:
        alt += f"; region: {session.region.name}, {_place(session.region.mask)}"
    panel = case_panel(
        "scan-image", session.shown_size, visible(alt), region=_outline(session, session.region), labels=labels
    )
    stage = Html('<div class="stage" data-width="{}" data-height="{}">{}{}<div class="band" hidden></div></div>')
    return stage.format(width, height, scan_definition(session.shown(), "scan-image"), panel)


def region_line(session: Session) -> Html:
    """The region in words, and of which question it is."""
    region = session.region
    if region is None:
        return Html('<p class="quiet">No region: Coverage and Intensity need one.</p>')
    text = f"{region.name}: {_place(region.mask)}, {100 * region.mask.mean():.1f} % of the image"
    if region.question:
        text += f", of the question “{region.question}”"
    return Html('<p class="quiet"><span class="solid" aria-hidden="true"></span> {}</p>').format(text)


def picks_list(session: Session) -> Html:
    """Which segments the question picks, best first."""
    picks = session.picks
    if picks is None:
        return Html()
    rows = Html().join(
        Html("<li>{}, similarity {:.2f}</li>").format(_place(picks.mask(rank)), picks.ranked.similarity[index])
        for rank, index in enumerate(picks.best)
    )
    heading = f"{len(picks.ranked.segments)} segments found; the question “{picks.question}” picks:"
    line = Html('<p class="quiet"><span class="dashed" aria-hidden="true"></span> {}</p><ol class="quiet">{}</ol>')
    return line.format(heading, rows)


def no_answer() -> Html:
    """What stands in a pane that has none."""
    return Html('<p class="quiet">No answer yet.</p>')


def asked(question: str, model: str, method: str, settings: EvaluationConfig, told: str = "") -> Html:
    """What an answer is to, and how it is made; `told` as in `Answer`."""
    how = [model, method, f"at most {settings.max_new_tokens} tokens", f"seed {settings.seed}"]
    how += [f"told to look at: {told}"] if told else []
    return Html('<p class="asked">“{}”</p><p class="who">{}</p>').format(question, " · ".join(how))


def answering(question: str, model: str, method: str, text: str, settings: EvaluationConfig) -> Html:
    """What there is of an answer so far."""
    said = Html(
        '<p class="said" aria-live="polite" aria-busy="true">{}<span class="typing" aria-hidden="true">▍</span></p>'
    ).format(text)
    return asked(question, model, method, settings) + said


def answered(answer: Answer, settings: EvaluationConfig) -> Html:
    """An answer, under its question."""
    said = Html('<p class="said" aria-live="polite">{}</p>').format(answer.text or "(empty answer)")
    return asked(answer.question, answer.model, answer.method, settings, answer.told) + said


def failed(question: str, model: str, method: str, error: str, settings: EvaluationConfig) -> Html:
    """Why there is no answer."""
    return asked(question, model, method, settings) + notice(error, "error")


def looked(session: Session, pane: int, heads: Heads, row: int, settings: EvaluationConfig) -> Html:
    """Where the model of a pane looked, and how well that fits the region."""
    answer = session.answers.get(pane)
    if answer is None:
        return Html()
    heat = _heat(session, answer, heads, row)
    alt = f"Attention of {_quoted(answer, row)}, {heads_name(heads, answer)}: {_peak(heat)}"
    region = session.region_of(answer.question)
    # Panes and the scan of the left column stand on one page, so ids must differ.
    name = f"scan-{pane}"
    panel = case_panel(name, session.shown_size, visible(alt), heat=heat, region=_outline(session, region))
    figure = Html('<figure class="look">{}{}<figcaption>{}</figcaption></figure>{}')
    scores = _scores(session, answer, heads, row, settings) + _scored(session, region, settings)
    return figure.format(scan_definition(session.shown(), name), panel, alt, scores)


def hidden(session: Session, pane: int) -> Html:
    """What was said with parts of the image hidden, each with the picture that was asked about."""
    figures = Html().join(
        Html('<figure class="look">{}{}<figcaption>{}: <b>{}</b> ({})</figcaption></figure>').format(
            scan_definition(one.picture, f"hidden-{pane}-{one.part}"),
            case_panel(
                f"hidden-{pane}-{one.part}",
                session.shown_size,
                f"{TITLES[one.part]}, {one.filling} in its place: “{one.text}”",
                region=_outline(session, session.region),
            ),
            TITLES[one.part],
            one.text or "(empty answer)",
            "another answer" if one.changed else "the same answer",
        )
        for one in session.hidden.get(pane, ())
    )
    return Html('<div class="pictures">{}</div>').format(figures) if figures else Html()


def ratios(answer: Answer, pane: int) -> Html:
    """The visual attention ratio of every head, folded away."""
    best = np.unravel_index(answer.ratio_LH.argmax(), answer.ratio_LH.shape)
    alt = (
        f"Visual attention ratio of each of {answer.ratio_LH.shape[0]} layers and {answer.ratio_LH.shape[1]} heads in "
        f"percent; highest: layer {best[0] + 1}, head {best[1] + 1}"
    )
    text = "Which heads look at the image (share of attention, %)"
    return Html("<details><summary>{}</summary>{}</details>").format(text, head_grid(answer.ratio_LH, pane % 8, alt))


def attention_scores(
    session: Session, answer: Answer, heads: Heads, row: int, settings: EvaluationConfig
) -> dict[str, float | None]:
    """Attention metrics of a row against the region; None where undefined, empty without one of its question."""
    region = session.region_of(answer.question)
    if region is None:
        return {}
    map_1N, region_1N = answer.attention(heads, row)[None], answer.holds(region.mask)[None]
    values = attention_metrics(map_1N, region_1N, tau=settings.tau, normalisation=settings.normalisation)
    return {
        name: float(values[name][0]) if np.isfinite(values[name][0]) else None
        for name in in_order(values)
        if describe(name).main
    }


def png(session: Session, pane: int, heads: Heads, row: int) -> bytes:
    """The shown image under the attention of a pane's answer, as PNG without metadata."""
    file = io.BytesIO()
    overlay(session.shown(), _heat(session, session.answers[pane], heads, row)).save(file, "PNG")
    return file.getvalue()


def as_json(session: Session, heads: Heads, rows: Sequence[int], settings: EvaluationConfig) -> str:
    """Questions, answers, maps and numbers of all panes; `rows` by pane.

    Holds no file name and nothing of an image's header.
    """
    content = {
        "image": {"width": session.image.width, "height": session.image.height},
        "region": None if session.region is None else _region_record(session.region),
        "settings": {
            "heads": heads if isinstance(heads, str) else {"layer": heads[0] + 1, "head": heads[1] + 1},
            "dilation": settings.dilation,
            "tau": settings.tau,
            "normalisation": settings.normalisation,
            "max_new_tokens": settings.max_new_tokens,
            "seed": settings.seed,
        },
        "answers": [
            {
                **_record(session, answer, heads, rows[pane], settings),
                "hidden": [_hidden_record(one) for one in session.hidden.get(pane, ())],
            }
            for pane, answer in sorted(session.answers.items())
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)


def download(name: str, kind: str, content: bytes) -> dict[str, str]:
    """What the page's `save.js` takes: a file that exists in the browser only. `kind` is its media type."""
    return {"name": name, "href": f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"}


def _record(session: Session, answer: Answer, heads: Heads, row: int, settings: EvaluationConfig) -> Mapping[str, Any]:
    layers, numbers = np.nonzero(answer.selected_LH)
    return {
        "model": answer.model,
        "decoding": answer.method,
        "question": answer.question,
        "told_to_look_at": answer.told or None,
        "answer": answer.text,
        "tokens": list(answer.tokens),
        "selected_heads": [[int(layer) + 1, int(head) + 1] for layer, head in zip(layers, numbers, strict=True)],
        "visual_ratio": np.round(answer.ratio_LH, 5).tolist(),
        "token_boxes": np.round(answer.boxes, 2).tolist(),
        "map": _numbers(answer.attention(heads)),
        "map_per_token": [_numbers(answer.attention(heads, index + 1)) for index in range(len(answer.tokens))],
        "chosen": {"word": word(answer, row), **attention_scores(session, answer, heads, row, settings)},
    }


def _region_record(region: ChosenRegion) -> Mapping[str, Any]:
    return {"name": region.name, "box": _box(region.mask), "question": region.question or None}


def _hidden_record(one: Hidden) -> Mapping[str, Any]:
    return {"hidden": one.part, "filling": one.filling, "answer": one.text, "changed": one.changed}


def _scores(session: Session, answer: Answer, heads: Heads, row: int, settings: EvaluationConfig) -> Html:
    scores = attention_scores(session, answer, heads, row, settings)
    cells = Html().join(
        Html("<div><dt>{}</dt><dd>{}</dd></div>").format(describe(name).title, _shown(name, value))
        for name, value in scores.items()
    )
    return Html('<dl class="facts">{}</dl>').format(cells) if scores else Html()


def _scored(session: Session, region: ChosenRegion | None, settings: EvaluationConfig) -> Html:
    """What the scores above were measured against, or why there are none."""
    if region is not None:
        line = f"Against the region: {region.name}, {_place(region.mask)}. Coverage counts what is at least "
        line += f"{settings.tau:g}, {SCALED[settings.normalisation]}."
    elif session.region is not None:
        line = f"Not scored: the region ({session.region.name}) is that of “{session.region.question}”."
    else:
        line = "Not scored: there is no region."
    return Html('<p class="quiet against">{}</p>').format(line)


def _outline(session: Session, region: ChosenRegion | None) -> NDArray[np.bool_] | None:
    return None if region is None else session.shown_mask(region.mask)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "undefined"
    return number(value, name) + (" %" if describe(name).percent else "")


def _heat(session: Session, answer: Answer, heads: Heads, row: int) -> NDArray[np.float32]:
    return paint(answer.attention(heads, row), answer.boxes * session.scale, session.shown_size)


def _quoted(answer: Answer, row: int) -> str:
    return "the whole answer" if row == WHOLE else f"the word “{word(answer, row)}”"


def _peak(heat: NDArray[np.float32]) -> str:
    """Where the attention is strongest, in words for screen readers."""
    if not heat.any():
        return "none on the image"
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    return f"strongest {100 * x / heat.shape[1]:.0f} % from the left, {100 * y / heat.shape[0]:.0f} % from the top"


def _place(mask: NDArray[np.bool_]) -> str:
    left, top, right, bottom = _box(mask)
    return f"left {left}, top {top}, right {right}, bottom {bottom}"


def _box(mask: NDArray[np.bool_]) -> list[int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1] if len(columns) else [0, 0, 0, 0]


def _numbers(map_N: NDArray[np.float32]) -> list[float]:
    return [float(f"{value:.4g}") for value in map_N]
