"""What happens on the page, and when. Knows Gradio's events; `layout` says what stands where, `view` how it looks."""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from a3tune.app import view
from a3tune.app.examples import examples
from a3tune.app.layout import NOTHING, Layout, Pane, script
from a3tune.app.model import WHOLE, Answer, Asker, Heads
from a3tune.app.regions import Segmenter, box_region
from a3tune.app.session import Session
from a3tune.data.images import load_image
from a3tune.decoding import DECODERS
from a3tune.errors import A3TuneError, DataError

TITLE = "A3Tune explorer"
MODEL, LOOKS = "model", 4
"""Queue of what needs a model, one at a time; how many redraw at once."""

Shown = dict[Any, Any]
"""Component -> what it shows now; the others stay as they are."""


class Page:
    """The explorer of some models; `blocks` is the Gradio application."""

    def __init__(self, asker: Asker, segmenter: Segmenter) -> None:
        self._asker, self._segmenter, self._settings = asker, segmenter, asker.settings
        names, first = list(asker.models), examples()[0]
        config = asker.models[names[0]].model.config.text_config
        shape = (config.num_hidden_layers, config.num_attention_heads)
        # Gradio gives every visitor a copy of this session.
        begin = Session(first.image, first.title)
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as self.blocks:
            self.ui = Layout(begin, names, list(DECODERS), self._settings.decode, shape)
            self._connect_image()
            self._connect_region()
            self._connect_answers()

    def _connect_image(self) -> None:
        ui = self.ui
        cleared = [ui.session, ui.scan, ui.status, ui.region, ui.picks, ui.rank, ui.suggestion, ui.question, ui.example]
        cleared += [part for pane in ui.panes for part in pane.answer_parts()]
        self._on(ui.example.input, self._open_example, [ui.example, ui.session], cleared)
        self._on(ui.upload.upload, self._open_upload, [ui.upload, ui.session], cleared)
        known = [ui.question, ui.scan, ui.region, ui.status, *(pane.looked for pane in ui.panes)]
        self._on(ui.suggestion.input, self._suggest, [ui.suggestion, *self._views()], known)

    def _connect_region(self) -> None:
        ui, views = self.ui, self._views()
        drawn = [ui.scan, ui.region, ui.status, *(pane.looked for pane in ui.panes)]
        self._on(ui.scan.box, self._draw_box, views, [*drawn, *ui.corners])
        self._on(ui.take_box.click, self._use_box, [*ui.corners, *views], drawn)
        self._on(ui.no_region.click, self._use_nothing, views, drawn)
        self._on(ui.rank.input, self._use_segment, [ui.rank, *views], drawn)
        self._on(ui.find.click, self._find, [ui.question, ui.session], [ui.scan, ui.picks, ui.rank, ui.status])

    def _connect_answers(self) -> None:
        ui, views = self.ui, self._views()
        asked = [ui.question, *(pane.model for pane in ui.panes), *(pane.method for pane in ui.panes), *views]
        shown = [ui.session, ui.status, *(part for pane in ui.panes for part in pane.answer_parts())]
        for event in (ui.ask.click, ui.question.submit):
            self._on(event, self._answer, asked, shown, concurrency_id=MODEL, concurrency_limit=1)
        looks = [pane.looked for pane in ui.panes]
        self._on(ui.mode.input, self._look_again, views, looks, trigger_mode="always_last")
        for control in (ui.layer, ui.head):
            self._on(control.input, self._one_head, views, [ui.mode, *looks], trigger_mode="always_last")
        for number, pane in enumerate(ui.panes):
            how = [ui.mode, ui.layer, ui.head, ui.session]
            look = self._look_at(number)
            self._on(pane.words.word, look, how, [pane.row, pane.looked], trigger_mode="always_last")
            self._save(pane.save, self._picture_of(number), [pane.row, *how])
        self._save(ui.save_json, self._numbers, views)

    def _save(self, button: gr.Button, step: Callable[..., Shown], inputs: Sequence[Any]) -> None:
        made = self._on(button.click, step, inputs, [self.ui.file, self.ui.status])
        made.success(None, [self.ui.file], None, js=script("save.js"))

    def _on(self, event: Any, step: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any], **how: Any):
        """Every step runs in the queue, is no public API, and says a visitor's mistakes in the status line."""
        how = {"concurrency_limit": LOOKS, "show_progress": "hidden", "api_visibility": "private"} | how
        return event(self._told(step), list(inputs), list(outputs), **how)

    def _told(self, step: Callable[..., Any]) -> Callable[..., Iterator[Shown]]:
        @wraps(step)
        def run(*arguments: Any) -> Iterator[Shown]:
            try:
                shown = step(*arguments)
                yield from [shown] if isinstance(shown, dict) else shown
            except A3TuneError as error:
                yield {self.ui.status: view.notice(str(error), "error")}

        return run

    def _views(self) -> list[Any]:
        """Inputs of `_look_again`: the word chosen in each pane, the heads, and the session as the last."""
        return [*(pane.row for pane in self.ui.panes), self.ui.mode, self.ui.layer, self.ui.head, self.ui.session]

    def _open_example(self, title: str, before: Session) -> Shown:
        example = next(one for one in examples() if one.title == title)
        prompts = [question.prompt for question in example.questions]
        return self._opened(Session(example.image, title), before) | {
            self.ui.suggestion: gr.update(choices=prompts, value=None, visible=True),
            self.ui.question: prompts[0],
            self.ui.status: "",
        }

    def _open_upload(self, path: str, before: Session) -> Shown:
        file = Path(path)
        try:
            # As bytes: what is said of an image must not name its file.
            image = load_image(file.read_bytes())
        finally:
            file.unlink(missing_ok=True)
        return self._opened(Session(image), before) | {
            self.ui.suggestion: gr.update(value=None, visible=False),
            self.ui.example: None,
            self.ui.status: view.notice(f"Image of {image.width} by {image.height} pixels opened."),
        }

    def _opened(self, session: Session, before: Session) -> Shown:
        before.closed = True
        shown: Shown = {self.ui.session: session, self.ui.picks: "", self.ui.rank: gr.update(value=None, visible=False)}
        for pane in self.ui.panes:
            shown |= {pane.said: "", **_empty(pane)}
        return shown | {self.ui.scan: view.scan(session), self.ui.region: view.region_line(session)}

    def _suggest(self, prompt: str, *views: Any) -> Shown:
        session: Session = views[-1]
        example = next(one for one in examples() if one.title == session.title)
        question = next(one for one in example.questions if one.prompt == prompt)
        where = question.organ or "none, it is about the whole image"
        session.set_region(question.region, question.organ)
        told = view.notice(f"The true answer is “{question.answer}”. Its region is set: {where}.")
        return self._drawn(*views) | {self.ui.question: prompt, self.ui.status: told}

    def _draw_box(self, event: gr.EventData, *views: Any) -> Shown:
        corners = tuple(getattr(event, side) for side in ("left", "top", "right", "bottom"))
        return self._use_box(*corners, *views) | dict(zip(self.ui.corners, corners, strict=True))

    def _use_box(self, *values: Any) -> Shown:
        session: Session = values[-1]
        session.set_region(box_region(values[:4], session.image), "box")
        return self._drawn(*values[4:])

    def _use_nothing(self, *views: Any) -> Shown:
        views[-1].set_region(None)
        return self._drawn(*views)

    def _use_segment(self, rank: int, *views: Any) -> Shown:
        session: Session = views[-1]
        if session.picks is not None:
            session.set_region(session.picks.mask(rank), f"segment {rank + 1}")
        return self._drawn(*views)

    def _drawn(self, *views: Any) -> Shown:
        """Everything that a new region changes."""
        session: Session = views[-1]
        shown = {self.ui.scan: view.scan(session), self.ui.region: view.region_line(session), self.ui.status: ""}
        return shown | self._look_again(*views)

    def _find(self, question: str, session: Session) -> Iterator[Shown]:
        yield {self.ui.status: view.notice("Finding segments …")}
        session.picks = self._segmenter.pick(session.image, _asked(question))
        if session.closed:
            return
        ranks = [(str(rank + 1), rank) for rank in range(len(session.picks.best))]
        yield {
            self.ui.scan: view.scan(session),
            self.ui.picks: view.picks_list(session),
            self.ui.rank: gr.update(choices=ranks, value=None, visible=bool(ranks)),
            self.ui.status: view.notice(f"{len(session.picks.ranked.segments)} segments found."),
        }

    def _answer(self, question: str, *values: Any) -> Iterator[Shown]:
        count = len(self.ui.panes)
        models, methods, (mode, layer, head, session) = values[:count], values[count : 2 * count], values[-4:]
        question, heads = _asked(question), _heads(mode, layer, head)
        for number, (pane, model, method) in enumerate(zip(self.ui.panes, models, methods, strict=True)):
            session.answers.pop(number, None)
            yield {pane.said: "", **_empty(pane)}
            if model == NOTHING:
                continue
            yield {self.ui.status: view.notice(f"{model} is answering …")}
            for said in self._asker.ask(model, method, session.image, question, session.region):
                if session.closed:
                    return
                if isinstance(said, Answer):
                    session.answers[number] = said
                    yield self._answered(pane, number, session, heads)
                else:
                    yield {pane.said: view.answer_text(said, model, method, done=False)}
        # Given back so that Gradio counts the visitor's hour from here.
        yield {self.ui.session: session, self.ui.status: view.notice("Answered.")}

    def _answered(self, pane: Pane, number: int, session: Session, heads: Heads) -> Shown:
        answer = session.answers[number]
        return {
            pane.said: view.answer_text(answer.text, answer.model, answer.method, done=True),
            pane.words: view.words(answer, number),
            pane.looked: view.looked(session, number, heads, WHOLE, self._settings),
            pane.ratios: view.ratios(answer, number),
            pane.save: gr.update(visible=True),
        }

    def _look_again(self, *views: Any) -> Shown:
        *rows, mode, layer, head, session = views
        heads = _heads(mode, layer, head)
        return {
            pane.looked: view.looked(session, number, heads, row, self._settings)
            for number, (pane, row) in enumerate(zip(self.ui.panes, rows, strict=True))
        }

    def _one_head(self, *views: Any) -> Shown:
        *rows, _, layer, head, session = views
        return {self.ui.mode: "one"} | self._look_again(*rows, "one", layer, head, session)

    def _look_at(self, number: int) -> Callable[..., Shown]:
        def look(event: gr.EventData, mode: str, layer: int, head: int, session: Session) -> Shown:
            row, pane = int(event.row), self.ui.panes[number]
            return {
                pane.row: row,
                pane.looked: view.looked(session, number, _heads(mode, layer, head), row, self._settings),
            }

        return look

    def _picture_of(self, number: int) -> Callable[..., Shown]:
        def picture(row: int, mode: str, layer: int, head: int, session: Session) -> Shown:
            content = view.png(session, number, _heads(mode, layer, head), row)
            return {self.ui.file: view.download("attention.png", "image/png", content)}

        return picture

    def _numbers(self, *views: Any) -> Shown:
        *rows, mode, layer, head, session = views
        if not session.answers:
            return {self.ui.file: None, self.ui.status: view.notice("Nothing to save yet: ask a question first.")}
        text = view.as_json(session, _heads(mode, layer, head), rows, self._settings)
        return {self.ui.file: view.download("answers.json", "application/json", text.encode())}


def _empty(pane: Pane) -> Shown:
    """A pane without an answer."""
    blank = dict.fromkeys((pane.words, pane.looked, pane.ratios), "")
    return {**blank, pane.row: WHOLE, pane.save: gr.update(visible=False)}


def _heads(mode: str, layer: int, head: int) -> Heads:
    return (layer, head) if mode == "one" else mode


def _asked(question: str) -> str:
    if not question.strip():
        raise DataError("question: expected some text, got none")
    return question.strip()
