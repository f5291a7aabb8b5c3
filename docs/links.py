"""A hook of MkDocs: what pages name as code becomes a link to where it is described, in `api/`.

Links settings (`labels.top_k`, `labels.top_k=2`), and names of the package that hold an underscore or begin with a
capital (`load_vlm`, `ModelError`): words such as `train` mean other things, too.
"""

import re
from pathlib import Path
from typing import Any

SETTING = re.compile(r"(model|data|labels|adapter|alignment|training|evaluation)\.([a-z_0-9]+)(=.*)?")


def on_config(config: Any) -> None:
    """Collects what the pages of `api/` describe."""
    pages = (page.read_text(encoding="utf-8") for page in sorted(Path(config.docs_dir, "api").glob("*.md")))
    described = [name for page in pages for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)]
    config.extra["described"] = {name.rpartition(".")[2]: name for name in described}


def on_page_content(html: str, config: Any, **kwargs: Any) -> str:
    def link(found: re.Match[str]) -> str:
        text = found[1]
        if setting := SETTING.fullmatch(text):
            target = f"a3tune.config.{setting[1].capitalize()}Config.{setting[2]}"
        elif "_" in text or text[:1].isupper():
            target = config.extra["described"].get(text)
        else:
            target = None
        return f'<autoref identifier="{target}" optional>{found[0]}</autoref>' if target else found[0]

    return re.sub(r"(?<!<pre>)<code>([^<]+)</code>(?!</a>)", link, html)
