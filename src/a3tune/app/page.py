"""What happens on the page, and when. Knows Gradio's events; `layout` says what stands where, `view` how it looks."""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any

import gradio as gr

from a3tune.app import view
from a3tune.app.examples import Example, examples
from a3tune.app.hidden import ask_hidden
from a3tune.app.layout import NOTHING, Layout, Pane, script
from a3tune.app.model import WHOLE, Answer, Asker, Heads
from a3tune.app.regions import ChosenRegion, Segmenter, box_region
from a3tune.app.session import Session
from a3tune.app.visitors import Visitors
from a3tune.data.images import load_image
from a3tune.data.phantom.questions import Question
from a3tune.data.rows import words
from a3tune.decoding import DECODERS
from a3tune.errors import A3TuneError, DataError
from a3tune.types import Filling

TITLE = "A3Tune explorer"
MODEL, LOOKS = "model", 4
"""Queue of what needs a model, one at a time; how many redraw at once."""

Shown = dict[Any, Any]
"""Component -> what it shows now; the others stay as they are."""


class Page:
    """The explorer of some models; `blocks` is the Gradio application."""

    def __init__(self, asker: Asker, segmenter: Segmenter) -> None:
        self._asker, self._segmenter, self._settings = asker, segmenter, asker.settings
        self._visitors = Visitors()
        names = list(asker.models)
        config = asker.models[names[0]].model.config.text_config
        shape = (config.num_hidden_layers, config.num_attention_heads)
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as self.blocks:
            self.ui = Layout(names, list(DECODERS), self._settings.decode, shape)
            self._connect_sessions()
            self._connect_region()
            self._connect_answers()

    def _connect_sessions(self) -> None:
        ui = self.ui
        shown = [ui.session, ui.scan, ui.status, ui.region, ui.picks, ui.rank, ui.suggestion]
        shown += [ui.question, ui.ask, ui.example]
        shown += [ui.mode, ui.layer, ui.head, *(part for pane in ui.panes for part in pane.parts())]
        loaded = self._on(self.blocks.load, self._arrive, [ui.key], [ui.key, *shown], js=script("key.js"))
        loaded.then(None, [ui.key], None, js="(key) => sessionStorage.setItem('a3tune', key)")
        self._on(ui.example.input, self._open_example, [ui.example, ui.session], shown)
        self._on(ui.upload.upload, self._open_upload, [ui.upload, ui.question, ui.session], shown)

    def _connect_region(self) -> None:
        ui, views = self.ui, self._views()
        drawn = [ui.scan, ui.region, ui.status, *self._looks()]
        self._on(ui.scan.box, self._draw_box, views, [*drawn, *ui.corners])
        self._on(ui.take_box.click, self._use_box, [*ui.corners, *views], drawn)
        self._on(ui.no_region.click, self._use_nothing, views, drawn)
        self._on(ui.rank.input, self._use_segment, [ui.rank, *views], drawn)
        self._on(ui.find.click, self._find, [ui.question, ui.session], [ui.scan, ui.picks, ui.rank, ui.status])
        known = [ui.question, ui.picks, ui.rank, *drawn]
        self._on(ui.suggestion.input, self._suggest, [ui.suggestion, *views], known)
        # What is typed is another question than the chosen one.
        ui.question.change(None, [ui.question], [ui.suggestion], js="(question) => question")

    def _connect_answers(self) -> None:
        ui, views = self.ui, self._views()
        asked = [ui.turn, ui.question, *(pane.model for pane in ui.panes), *(pane.method for pane in ui.panes)]
        asked += [ui.hide, ui.filling, *views]
        shown = [ui.session, ui.status, *(part for pane in ui.panes for part in pane.answer_parts())]
        one_by_one = {"concurrency_id": MODEL, "concurrency_limit": 1, "trigger_mode": "multiple"}
        for event in (ui.ask.click, ui.question.submit):
            turn = [ui.turn, ui.status]
            taken = self._on(event, self._take_turn, [ui.question, ui.session], turn, trigger_mode="multiple")
            taken.then(None, [ui.turn], None, js=script("answer.js"))
            self._on(taken.then, self._answer, asked, shown, **one_by_one)
        looks = [ui.layer, ui.head, *(pane.looked for pane in ui.panes)]
        for control in (ui.mode, ui.layer, ui.head):
            self._on(control.input, self._choose_heads, views, looks, trigger_mode="always_last")
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

    def _told(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def by_and_by(*arguments: Any) -> Iterator[Shown]:
            try:
                if arguments[-1] is None and step not in (self._arrive, self._open_example, self._open_upload):
                    raise DataError("this visit: forgotten, as after an hour without a question; load the page again")
                shown = step(*arguments)
                yield from [shown] if isinstance(shown, dict) else shown
            except A3TuneError as error:
                yield self._mistake(error)
            # Gradio shows what a generator gave last a second time when it has ended, over what was typed meanwhile.
            yield {self.ui.status: gr.skip()}

        @wraps(step)
        def once(*arguments: Any) -> Shown:
            return next(by_and_by(*arguments))

        return by_and_by if isgeneratorfunction(step) else once

    def _mistake(self, error: A3TuneError) -> Shown:
        return {self.ui.status: view.notice(str(error), "error")}

    def _looks(self) -> list[Any]:
        """What a new region changes in the panes."""
        return [part for pane in self.ui.panes for part in (pane.looked, pane.hidden)]

    def _views(self) -> list[Any]:
        """Inputs of `_look_again`: the word chosen in each pane, the heads, and the session as the last."""
        return [*(pane.row for pane in self.ui.panes), self.ui.mode, self.ui.layer, self.ui.head, self.ui.session]

    def _arrive(self, key: str | None) -> Shown:
        """A visitor opens the page, or loads it again."""
        session = self._visitors.arrive(key, _session(examples()[0]))
        return self._shown(session) | {self.ui.key: session.key}

    def _open_example(self, title: str, before: Session | None) -> Shown:
        return self._opened(_session(_example(title)), before)

    def _open_upload(self, path: str, question: str, before: Session | None) -> Shown:
        file = Path(path)
        try:
            # As bytes: what is said of an image must not name its file.
            image = load_image(file.read_bytes())
        finally:
            file.unlink(missing_ok=True)
        told = view.notice(f"Image of {image.width} by {image.height} pixels opened.")
        return self._opened(Session(image, question=question), before) | {self.ui.status: told}

    def _opened(self, session: Session, before: Session | None) -> Shown:
        if before is not None:
            before.closed = True
            session.key, session.heads = before.key, before.heads
            self._visitors.keep(session)
        return self._shown(session)

    def _shown(self, session: Session) -> Shown:
        """A session, from nothing."""
        ui, prompts = (
            self.ui,
            [question.prompt for question in _example(session.title).questions] if session.title else [],
        )
        shown = {
            ui.session: session,
            ui.status: "",
            ui.example: session.title or None,
            ui.suggestion: gr.update(choices=prompts, value=_one_of(prompts, session.question), visible=bool(prompts)),
            ui.question: gr.update(value=session.question, interactive=True),
            ui.ask: gr.update(interactive=True),
            ui.scan: view.scan(session),
            ui.region: view.region_line(session),
            **self._picked(session),
            **self._whose(session.heads),
        }
        for number, pane in enumerate(ui.panes):
            answer = session.answers.get(number)
            shown |= {pane.said: view.no_answer(), **_empty(pane)}
            if answer is not None:
                shown |= {pane.model: answer.model, pane.method: answer.method, **self._answered(pane, number, session)}
        return shown

    def _picked(self, session: Session) -> Shown:
        ranks = [(str(rank + 1), rank) for rank in range(len(session.picks.best))] if session.picks else []
        rank = gr.update(choices=ranks, value=None, visible=bool(ranks))
        return {self.ui.picks: view.picks_list(session), self.ui.rank: rank}

    def _whose(self, heads: Heads) -> Shown:
        if isinstance(heads, str):
            return {self.ui.mode: heads, **self._one_head(heads)}
        layer, head = (gr.update(value=value, interactive=True) for value in heads)
        return {self.ui.mode: "one", self.ui.layer: layer, self.ui.head: head}

    def _one_head(self, mode: str) -> Shown:
        """Layer and head can be chosen if there is one."""
        return {control: gr.update(interactive=mode == "one") for control in (self.ui.layer, self.ui.head)}

    def _suggest(self, prompt: str, *views: Any) -> Shown:
        session: Session = views[-1]
        question = next(one for one in _example(session.title).questions if one.prompt == prompt)
        session.question, session.picks = prompt, None
        session.set_region(_region(question))
        where = question.organ or "none, it is about the whole image"
        told = view.notice(f"The true answer is “{question.answer}”. Its region is set: {where}.")
        return self._drawn(*views) | self._picked(session) | {self.ui.question: prompt, self.ui.status: told}

    def _draw_box(self, event: gr.EventData, *views: Any) -> Shown:
        corners = tuple(getattr(event, side) for side in ("left", "top", "right", "bottom"))
        return self._use_box(*corners, *views) | dict(zip(self.ui.corners, corners, strict=True))

    def _use_box(self, *values: Any) -> Shown:
        session: Session = values[-1]
        session.set_region(box_region(values[:4], session.image))
        return self._drawn(*values[4:])

    def _use_nothing(self, *views: Any) -> Shown:
        views[-1].set_region(None)
        return self._drawn(*views)

    def _use_segment(self, rank: int, *views: Any) -> Shown:
        session: Session = views[-1]
        if session.picks is not None:
            session.set_region(session.picks.region(rank))
        return self._drawn(*views)

    def _drawn(self, *views: Any) -> Shown:
        """Everything that a new region changes."""
        session: Session = views[-1]
        shown = {self.ui.scan: view.scan(session), self.ui.region: view.region_line(session), self.ui.status: ""}
        shown |= {pane.hidden: "" for pane in self.ui.panes}
        return shown | self._look_again(*views)

    def _find(self, question: str, session: Session) -> Iterator[Shown]:
        yield {self.ui.status: view.notice("Finding segments …")}
        session.picks = self._segmenter.pick(session.image, _asked(question))
        if session.closed:
            return
        yield {
            self.ui.scan: view.scan(session),
            **self._picked(session),
            self.ui.status: view.notice(f"{len(session.picks.ranked.segments)} segments found."),
        }

    def _take_turn(self, question: str, session: Session) -> Shown:
        """From now on no other question is being answered; without a turn nothing is."""
        try:
            session.question = _asked(question)
        except DataError as error:
            return {self.ui.turn: None} | self._mistake(error)
        session.turn += 1
        return {self.ui.turn: session.turn, self.ui.status: view.notice("Asking …")}

    def _answer(self, turn: int | None, question: str, *values: Any) -> Iterator[Shown]:
        count = len(self.ui.panes)
        models, methods, (hide, filling) = values[:count], values[count : 2 * count], values[2 * count : 2 * count + 2]
        session: Session = values[-1]
        if turn is None or not session.waits_for(turn):
            return
        session.heads = _heads(*values[-4:-1])
        session.answers.clear()
        session.hidden.clear()
        for pane in self.ui.panes:
            yield {pane.said: view.no_answer(), **_empty(pane)}
        mistakes = []
        for number, (model, method) in enumerate(zip(models, methods, strict=True)):
            if model == NOTHING:
                continue
            yield {self.ui.status: view.notice(f"{model} is answering …")}
            asked = (question.strip(), model, method)
            try:
                yield from self._ask(number, session, turn, asked)
                if hide:
                    yield from self._ask_hidden(number, session, turn, filling)
            except A3TuneError as error:
                mistakes.append(f"{model}, {method}: {error}")
                yield {self.ui.panes[number].said: view.failed(*asked, str(error), self._settings)}
            if not session.waits_for(turn):
                return
        region = session.region_of(question.strip())
        told = "Answered." if not hide or region is not None else "Answered; there is no region to hide."
        status = view.notice("; ".join(mistakes), "error") if mistakes else view.notice(told)
        # Given back so that Gradio counts the visitor's hour from here.
        yield {self.ui.session: session, self.ui.status: status}

    def _ask(self, number: int, session: Session, turn: int, asked: tuple[str, str, str]) -> Iterator[Shown]:
        question, model, method = asked
        pane = self.ui.panes[number]
        for said in self._asker.ask(model, method, session.image, question, session.region_of(question)):
            if not session.waits_for(turn):
                return
            if isinstance(said, Answer):
                session.answers[number] = said
                yield self._answered(pane, number, session)
            else:
                yield {pane.said: view.answering(*asked, said, self._settings)}

    def _ask_hidden(self, number: int, session: Session, turn: int, filling: Filling) -> Iterator[Shown]:
        region, answer = session.region, session.answers.get(number)
        for said in ask_hidden(self._asker, session, answer, filling) if answer else ():
            if not session.waits_for(turn) or session.region is not region:
                return
            session.hidden.setdefault(number, []).append(said)
            yield {self.ui.panes[number].hidden: view.hidden(session, number)}

    def _answered(self, pane: Pane, number: int, session: Session) -> Shown:
        answer = session.answers[number]
        return {
            pane.said: view.answered(answer, self._settings),
            pane.words: view.words(answer, number),
            pane.row: WHOLE,
            pane.looked: view.looked(session, number, session.heads, WHOLE, self._settings),
            pane.hidden: view.hidden(session, number),
            pane.ratios: view.ratios(answer, number),
            pane.save: gr.update(visible=True),
        }

    def _choose_heads(self, *views: Any) -> Shown:
        *_, mode, layer, head, session = views
        session.heads = _heads(mode, layer, head)
        return self._one_head(mode) | self._look_again(*views)

    def _look_again(self, *views: Any) -> Shown:
        *rows, mode, layer, head, session = views
        heads = _heads(mode, layer, head)
        return {
            pane.looked: view.looked(session, number, heads, row, self._settings)
            for number, (pane, row) in enumerate(zip(self.ui.panes, rows, strict=True))
        }

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
    blank = dict.fromkeys((pane.words, pane.looked, pane.hidden, pane.ratios), "")
    return {**blank, pane.row: WHOLE, pane.save: gr.update(visible=False)}


def _heads(mode: str, layer: int, head: int) -> Heads:
    return (layer, head) if mode == "one" else mode


def _asked(question: str) -> str:
    return words("question", question).strip()


def _example(title: str) -> Example:
    return next(one for one in examples() if one.title == title)


def _session(example: Example) -> Session:
    """An example with its first question."""
    first = example.questions[0]
    return Session(example.image, example.title, question=first.prompt, region=_region(first))


def _region(question: Question) -> ChosenRegion | None:
    return None if question.region is None else ChosenRegion(question.region, question.organ, question.prompt)


def _one_of(choices: Sequence[str], wanted: str) -> str | None:
    return wanted if wanted in choices else None
