"""Which tokens are markup, against a slow loop."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from a3tune.adapters.routing import is_markup

IMAGE, CONTROL, BREAK, WORD = range(4)
ROWS = st.lists(st.sampled_from([IMAGE, CONTROL, BREAK, WORD]), min_size=1, max_size=12)


def found(rows: list[list[int]], layout: tuple[int, ...] = (BREAK,)) -> Tensor:
    ids = torch.tensor(rows)
    return is_markup(ids, ids == IMAGE, (CONTROL,), layout)


def slow(row: list[int]) -> list[bool]:
    """Walk from every line end to both sides, past control tokens and line ends."""
    marked = []
    for place, token in enumerate(row):
        left, right = row[:place][::-1], row[place + 1 :]
        ends = [next((other for other in side if other not in (CONTROL, BREAK)), WORD) for side in (left, right)]
        marked.append(token == CONTROL or (token == BREAK and ends == [IMAGE, IMAGE]))
    return marked


@given(ROWS, ROWS)
@example([IMAGE, BREAK, CONTROL, IMAGE, BREAK, WORD], [WORD, BREAK, CONTROL, IMAGE, BREAK])
@example([IMAGE, BREAK, BREAK, CONTROL, CONTROL, IMAGE], [IMAGE, BREAK, WORD, BREAK, IMAGE])
def test_line_ends_are_layout_between_images_and_nothing_else(first: list[int], second: list[int]) -> None:
    length = max(len(first), len(second))
    rows = [row + [WORD] * (length - len(row)) for row in (first, second)]
    assert found(rows).tolist() == [slow(row) for row in rows]


def test_who_names_no_layout_has_control_tokens_only() -> None:
    row = [IMAGE, BREAK, CONTROL, IMAGE, BREAK, WORD]
    assert found([row], ()).tolist() == [[token == CONTROL for token in row]]
