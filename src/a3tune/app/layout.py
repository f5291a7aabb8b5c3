"""What stands where on the page. Knows Gradio's components, not what happens when they are used."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from a3tune.app.examples import examples
from a3tune.app.model import WHOLE
from a3tune.evaluation.occlusion import FILLINGS

NOTHING = "(nothing)"
"""Stands in place of a model: the pane is not used."""
SESSION_SECONDS = 3600
"""After about this long without a step a visitor's image and answers are forgotten."""
LONGEST = 2000
"""Question, in characters."""
ABOUT = """<header><h1>A3Tune explorer</h1>
<p>Ask a vision-language model about a medical image and see where it looks while it answers.
Attention is no explanation: it shows what a head reads, not why the model says what it says.
For research; not a medical device. An image that you open is kept in this server's memory, for about an hour.</p>
</header>"""
SCALE = """<p class="scale"><span>little attention</span><i class="ramp" aria-hidden="true"></i><span>much</span></p>
<p class="quiet">Every picture has its own scale: colours compare places in one picture, not pictures.</p>"""


@dataclass(frozen=True)
class Pane:
    """Where one answer stands."""

    model: gr.Dropdown
    method: gr.Dropdown
    said: gr.HTML
    words: gr.HTML
    row: gr.Number
    """Which of the words is chosen: a row of `Answer`."""
    looked: gr.HTML
    hidden: gr.HTML
    """What is said with parts of the image hidden."""
    ratios: gr.HTML
    """Beside `looked`, so that it stays unfolded when another word is chosen."""
    save: gr.Button

    def parts(self) -> list[Any]:
        return [self.model, self.method, *self.answer_parts()]

    def answer_parts(self) -> list[Any]:
        return [self.said, self.words, self.row, self.looked, self.hidden, self.ratios, self.save]


class Layout:
    """All components, made inside an open `gr.Blocks`."""

    def __init__(self, models: Sequence[str], methods: Sequence[str], method: str, shape: tuple[int, int]) -> None:
        """`models` and `methods` can be chosen, `method` is chosen first; `shape`: layers, heads of a layer.

        There is a pane per model, and two at least. What a session says is filled in when the page is loaded; until
        then nothing can be asked, as it would be filled in over what was typed.
        """
        self.session = gr.State(time_to_live=SESSION_SECONDS)
        self.key = gr.Textbox(visible=False)
        self.turn = gr.Number(precision=0, visible=False)
        self.file = gr.JSON(visible=False)
        gr.HTML(ABOUT)
        self.status = gr.HTML(elem_id="status")
        # In a phone's order; where there is room, `page.css` puts the first and the last on the left.
        with gr.Row(elem_classes="parts"):
            with gr.Column(elem_classes="aside"):
                self._lay_out_image()
            with gr.Column():
                self._lay_out_question()
            with gr.Column(elem_id="answer"):
                gr.HTML("<h2>Answer</h2>")
                with gr.Row(elem_classes="panes"):
                    self.panes = [_pane(number, models, methods, method) for number in range(max(2, len(models)))]
                gr.HTML(SCALE)
                self._lay_out_heads(*shape)
                self.save_json = gr.Button("Save answers and maps (JSON)", size="sm", elem_id="save-json")
            with gr.Column(elem_classes="aside"):
                self._lay_out_region()

    def _lay_out_image(self) -> None:
        gr.HTML("<h2>Image</h2>")
        self.scan = gr.HTML(js_on_load=script("box.js"), elem_id="scan")
        self.region = gr.HTML(elem_id="region")
        titles = [example.title for example in examples()]
        self.example = gr.Radio(titles, label="Synthetic scans", elem_id="example")
        self.upload = gr.UploadButton("Open an image: PNG, JPEG, TIFF, DICOM", size="md", elem_id="upload")

    def _lay_out_region(self) -> None:
        gr.HTML("<h2>Region, if you like</h2>")
        gr.HTML(
            '<p class="quiet">Where the answer is to be found. Drag a box over the image (with a finger: tap two '
            "corners), type its corners in pixels, or let the question pick segments.</p>"
        )
        with gr.Row(elem_classes="corners"):
            self.corners = [
                gr.Number(label=side, precision=0, minimum=0, min_width=60, elem_id=f"box-{side.lower()}")
                for side in ("Left", "Top", "Right", "Bottom")
            ]
        with gr.Row():
            self.take_box = gr.Button("Use this box", size="sm", min_width=90, elem_id="take-box")
            self.no_region = gr.Button("No region", size="sm", min_width=90, elem_id="no-region")
            self.find = gr.Button("Find segments", size="sm", min_width=90, elem_id="find")
        self.picks = gr.HTML(elem_id="picks")
        self.rank = gr.Radio([], label="Use a segment as the region", visible=False, elem_id="rank")
        self.hide = gr.Checkbox(label="Ask again with the region hidden", elem_id="hide")
        self.filling = gr.Dropdown(list(FILLINGS), value="mean", label="In its place", elem_id="filling")

    def _lay_out_question(self) -> None:
        gr.HTML("<h2>Question</h2>")
        self.suggestion = gr.Radio([], label="Questions with known answers", elem_id="suggestion")
        with gr.Row(elem_classes="ask"):
            self.question = gr.Textbox(
                label="Your question",
                max_length=LONGEST,
                scale=4,
                min_width=180,
                interactive=False,
                elem_id="question",
            )
            self.ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, interactive=False, elem_id="ask")

    def _lay_out_heads(self, layers: int, heads: int) -> None:
        modes = [("Selected heads (averaged)", "selected"), ("All heads (averaged)", "all"), ("One head", "one")]
        with gr.Row(elem_classes="heads"):
            self.mode = gr.Radio(modes, value="selected", label="Attention of", elem_id="mode", scale=5)
            # A drop-down that is passed by with Tab says that it was used.
            self.layer, self.head = (
                gr.Dropdown(
                    _counted(count), value=0, label=label, min_width=80, interactive=False, elem_id=label.lower()
                )
                for label, count in (("Layer", layers), ("Head", heads))
            )


def script(name: str) -> str:
    """A JavaScript file of this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _pane(number: int, models: Sequence[str], methods: Sequence[str], method: str) -> Pane:
    letter = "ABC"[number]
    with gr.Column(min_width=240, elem_classes="pane", elem_id=f"pane-{number}"):
        with gr.Row(elem_classes="who-asks"):
            model = models[number] if number < len(models) else NOTHING
            choices = [*models, NOTHING] if number else list(models)
            own_model = gr.Dropdown(choices, value=model, label=f"Model {letter}", min_width=110)
            own_method = gr.Dropdown(list(methods), value=method, label=f"Decoding {letter}", min_width=110)
        return Pane(
            model=own_model,
            method=own_method,
            said=gr.HTML(),
            words=gr.HTML(js_on_load=script("words.js")),
            row=gr.Number(WHOLE, precision=0, visible=False),
            looked=gr.HTML(),
            hidden=gr.HTML(),
            ratios=gr.HTML(),
            save=gr.Button("Save picture (PNG)", size="sm", visible=False),
        )


def _counted(count: int) -> list[tuple[str, int]]:
    """(shown, value): people count from 1."""
    return [(str(number + 1), number) for number in range(count)]
