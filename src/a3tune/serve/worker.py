"""The one thread that asks the models: what waits together is asked together. Knows questions; no HTTP.

A question is forgotten when it is answered; nothing of it is written anywhere.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from secrets import randbits
from time import perf_counter

from torch import Tensor

from a3tune.config import EvaluationConfig
from a3tune.decoding.strategy import end_tokens
from a3tune.errors import A3TuneError
from a3tune.evaluation.answer import Answer, looked_at
from a3tune.evaluation.asking import Read, answers, evaluation_mode, in_memory, read, with_answers
from a3tune.serve.metrics import Metrics
from a3tune.serve.refusal import Refusal
from a3tune.serve.request import Question
from a3tune.vlm.encode import Example
from a3tune.vlm.load import Vlm
from a3tune.vlm.look import answer_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """The end of an answer."""

    text: str
    """The whole of it."""
    finish: str
    """`stop`, or `length` where it was cut at the most tokens asked for."""
    prompt_tokens: int
    answer_tokens: int
    attention: Answer | None
    """Where the model looked, if that was asked for."""


Message = str | Answered | Refusal
"""What a question's owner is told: more of the text, and at last the end or why there is none."""


class Job:
    """A question on its way; `tell` is called from the worker's thread."""

    def __init__(self, question: Question, tell: Callable[[Message], None]) -> None:
        self.question = question
        self.id = question.sample.id
        self.cancelled = False
        """Set by whoever no longer wants the answer."""
        self.started = perf_counter()
        self._tell = tell
        self._told = ""

    def grows(self, text: str) -> bool:
        """Tell what is new in the text so far. Returns whether the answer ends here."""
        cut, stopped = cut_at(text, self.question.stops)
        if self.question.stream:
            self._more(cut if stopped else _certain(cut, self.question.stops))
        return stopped

    def ends(self, answered: Answered) -> None:
        if self.question.stream:
            self._more(answered.text)
        self._tell(answered)

    def fails(self, refusal: Refusal) -> None:
        self._tell(refusal)

    def _more(self, text: str) -> None:
        if text.startswith(self._told) and text != self._told:
            self._tell(text[len(self._told) :])
            self._told = text


class Worker:
    """Asks the models, in batches of one kind (`Question.kind`), first come first served."""

    def __init__(
        self, models: Mapping[str, Vlm], settings: Mapping[str, EvaluationConfig], most: int, metrics: Metrics
    ) -> None:
        """`settings` of each model, over its own heads and rows (`EvaluationConfig.over`); `most` questions a batch."""
        self.models, self.settings = models, settings
        self._most, self._metrics = most, metrics
        self._jobs: list[Job] = []
        self._running: list[Job] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="models", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job) -> None:
        """Raises Refusal when the server is ending."""
        with self._changed:
            if self._closed:
                raise Refusal(503, "the server is ending")
            self._jobs.append(job)
            self._changed.notify()

    def close(self, patience: float) -> None:
        """Refuse what waits, give what is being answered some seconds, then end it."""
        with self._changed:
            self._closed = True
            waiting, self._jobs = self._jobs, []
            self._changed.notify()
        for job in waiting:
            job.fails(Refusal(503, "the server is ending"))
        self._thread.join(patience)
        for job in self._running:
            job.cancelled = True
            job.fails(Refusal(503, "the server is ending"))
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            start = perf_counter()
            for job in jobs:
                self._metrics.waited(start - job.started)
            try:
                self._ask(jobs)
            except _NobodyWaitsError:
                pass
            except Exception as error:  # the thread goes on whatever a model does
                # Without its message, which may quote a question.
                logger.error("answering failed: %s at %s", type(error).__name__, _place(error))
                for job in jobs:
                    job.fails(Refusal(500, "answering failed; the server's log has the kind of error"))
            self._metrics.batch(len(jobs), perf_counter() - start)
            self._running = []

    def _next(self) -> list[Job]:
        """The first question that waits, and those of its kind; nothing when the server ends."""
        with self._changed:
            while True:
                self._jobs = [job for job in self._jobs if not job.cancelled]
                if self._jobs:
                    break
                if self._closed:
                    return []
                self._changed.wait()
            kind = self._jobs[0].question.kind()
            self._running = [job for job in self._jobs if job.question.kind() == kind][: self._most]
            self._jobs = [job for job in self._jobs if job not in self._running]
            return self._running

    def _ask(self, jobs: Sequence[Job]) -> None:
        vlm = self.models[jobs[0].question.model]
        seen: dict[Job, Read] = {}
        for job in jobs:
            try:
                seen[job] = read(vlm, job.question.sample)
            except A3TuneError as error:
                job.fails(Refusal(400, _about(job, error)))
        if seen:
            with evaluation_mode(vlm):
                try:
                    in_memory(lambda some: self._answer(vlm, {job: seen[job] for job in some}), list(seen))
                except A3TuneError as error:
                    for job in seen:
                        job.fails(Refusal(400, _about(job, error)))

    def _answer(self, vlm: Vlm, seen: Mapping[Job, Read]) -> None:
        jobs = list(seen)
        first = jobs[0].question
        settings = replace(
            self.settings[first.model],
            decode=first.decode,
            decoding=dict(first.decoding),
            max_new_tokens=first.max_new_tokens,
            seed=first.seed if first.seed is not None else randbits(32),
        )
        # One name for all: random numbers are those of the seed, as with `a3tune ask`, not of the request's name.
        batch = [replace(job.question.sample, id="question") for job in jobs]
        examples = [one.example for one in seen.values()]
        regions = [one.region_N for one in seen.values()]
        generated = answers(
            vlm, batch, examples, regions, settings, strategy=first.strategy, watcher=_Growing(vlm, jobs)
        )
        answered = with_answers(examples, generated)
        wanted = [index for index, job in enumerate(jobs) if job.question.attention and not job.cancelled]
        images = [seen[jobs[index]].image for index in wanted]
        found = looked_at(vlm, [answered[index] for index in wanted], images, settings) if wanted else []
        attention = dict(zip(wanted, found, strict=True))
        for index, (job, example) in enumerate(zip(jobs, answered, strict=True)):
            ended = _ended(vlm, job, example, attention.get(index))
            self._metrics.tokens(ended.prompt_tokens, ended.answer_tokens)
            job.ends(ended)


class _NobodyWaitsError(Exception):
    """All who asked are gone."""


class _Growing:
    """Tells the answers of a batch while they grow, and ends those that nobody wants."""

    def __init__(self, vlm: Vlm, jobs: Sequence[Job]) -> None:
        self._vlm, self._jobs = vlm, jobs
        self._followed = [job.question.stream or bool(job.question.stops) for job in jobs]

    def before_pass(self) -> None:
        if all(job.cancelled for job in self._jobs):
            raise _NobodyWaitsError

    def after_token(self, tokens_BS: Tensor) -> Sequence[bool]:
        return [
            job.cancelled or (followed and job.grows(answer_text(self._vlm, tokens_S)))
            for job, followed, tokens_S in zip(self._jobs, self._followed, tokens_BS, strict=True)
        ]


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of the texts that end it, and whether there was one."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(ends)].rstrip(), True) if ends else (text, False)


def _certain(text: str, stops: Sequence[str]) -> str:
    """What of a text that grows stays, whatever comes: no half character, and no beginning of what would end it."""
    text = text.rstrip("\ufffd")
    held = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return text[: len(text) - max(held, default=0)].rstrip()


def _ended(vlm: Vlm, job: Job, example: Example, attention: Answer | None) -> Answered:
    tokens = example.input_ids[example.prompt_length :]
    text, stopped = cut_at(answer_text(vlm, tokens), job.question.stops)
    ended = len(tokens) > 0 and int(tokens[-1]) in end_tokens(vlm)
    cut = len(tokens) >= job.question.max_new_tokens and not (stopped or ended)
    return Answered(text, "length" if cut else "stop", example.prompt_length, len(tokens), attention)


def _about(job: Job, error: A3TuneError) -> str:
    """The message to who asked, without the name that their question has here."""
    return str(error).removeprefix(f"sample {job.id}: ").removeprefix("sample question: ")


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}" if trace else "?"
