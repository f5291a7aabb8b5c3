"""Text that others wrote, as people may see it: nothing in it is obeyed by a terminal, hidden, or turns what is around.

Knows letters; no markup (`report.escape`, `app.view`).
"""

import re

_UNSEEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters other than tab and line end
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of text
    "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2060-\u2065\u206a-\u206f"  # unseen
    "\u3164\ufeff\uffa0\ufff9-\ufffb"
    "\u2028\u2029"  # line ends that few programs know
    "\ud800-\udfff"  # halves of surrogate pairs
    "\U000e0000-\U000e007f"  # tags: a second, unseen alphabet
    "]"
)
"""Not the joiners U+200C and U+200D, which Persian, the scripts of India and emoji are written with."""


def visible(text: str) -> str:
    """The same with codes such as `\\u202e` in place of what a reader cannot see, or a terminal would obey."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """`visible`, with a space for every run of blanks: nothing in it ends a comment, a heading or a row of a table."""
    return " ".join(visible(re.sub(r"[\t\n\r\f\v]", " ", text)).split())
