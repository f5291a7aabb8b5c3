"""Texts of a stranger that are small programs, as regular expressions and chat templates are: tried in a process that
can be stopped.

Knows how to try them; not where they come from.
"""

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from functools import cache

SECONDS = 5.0
"""Longest trial; honest texts take a fraction of one."""
_TRY_PATTERNS = """
import json, re, sys
patterns, texts = json.load(sys.stdin)
for pattern in map(re.compile, patterns):
    for text in texts:
        pattern.match(text)
"""
_TRY_TEMPLATE = """
import json, sys
template, variables, sys.path = json.load(sys.stdin)
if sys.platform != "win32":  # which has no such limit: the seconds hold there
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):  # a tag that transformers adds
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def refused(message):
    raise jinja2.TemplateError(message)

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
environment.globals.update(raise_exception=refused, strftime_now=lambda form: "1 January 2026")
try:
    sys.exit(len(environment.from_string(template).render(variables)) > 1000000)
except (MemoryError, RecursionError):
    raise
except Exception:
    pass  # told by whoever uses it
"""


def patterns_end(patterns: Collection[str], texts: Sequence[str]) -> bool:
    """Whether regular expressions are valid and soon matched against all texts: a hostile one runs for years."""
    return not patterns or _ends(_TRY_PATTERNS, [list(patterns), list(texts)], "-S")


@cache
def template_ends(template: str) -> bool:
    """Whether a chat template makes its text soon, in a gigabyte, of a question about an image.

    Jinja's sandbox keeps a template from other things, and not from loops that never end. One that is hostile to some
    questions only is not found.
    """
    content = [{"type": "image"}, {"type": "text", "text": "Is there a lesion in the liver?"}]
    variables = {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
    return _ends(_TRY_TEMPLATE, [template, variables | {"bos_token": "<s>", "eos_token": "</s>"}, sys.path])


def _ends(code: str, about: object, *flags: str) -> bool:
    """Whether code, which reads JSON, ends well in time."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", *flags, "-c", code],
            input=json.dumps(about).encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return not done.returncode
