"""Every command and program that the documentation shows runs, or is looked up where it cannot (`documents.py`)."""

import re
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import a3tune
from a3tune.cli import app
from a3tune.config import load_config, plain_yaml
from a3tune.data.phantom import write_phantom
from a3tune.decoding import DECODERS
from a3tune.decoding.strategy import STRATEGIES
from a3tune.labels.propose import PROPOSERS
from a3tune.labels.rank import RANKERS, VISUAL_PROMPTS
from a3tune.metrics.catalogue import METRICS
from a3tune.vlm.families import FAMILIES
from documents import read_blocks, run_page
from lookups import ROOT, Wrong, check_prose, resolves
from standins import write_checkpoints, write_sam, write_slake

PAGES = ["README.md", "CONTRIBUTING.md"]
for pattern in ("docs/*.md", "docs/api/*.md", "docs/howto/*.md", "docs/decisions/*.md", "recipes/**/README.md"):
    PAGES += [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(pattern))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
REGISTRIES: tuple[dict[Any, Any], ...] = (
    PROPOSERS,
    RANKERS,
    VISUAL_PROMPTS,
    DECODERS,
    STRATEGIES,
    FAMILIES,
    METRICS,
)
PEFT_ASKS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
"""PEFT 0.21 asks the model by a name that transformers has deprecated."""
PATIENTS = {"train": 4, "validation": 1, "test": 2}
"""The most that are drawn for a page."""
Provide = Callable[[str], None]


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Pages on parts of one's own put some into the registries: other tests must not find them there."""
    kept = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, kept, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every page finds in its folder: three files of rows, their images, and an image."""
    folder = tmp_path_factory.mktemp("rows")
    files = write_phantom(folder, {"train": 1, "validation": 1, "test": 2}, seed=3)
    files["test"].write_text("".join(files["test"].read_text().splitlines(keepends=True)[::3]))
    shutil.copy(folder / "images" / "test-0000-0.png", folder / "scan.png")
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """A folder with labels and two runs: trained for two steps on the rows, and evaluated."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(rows, folder, dirs_exist_ok=True)
    budget = "training.max_steps=2 training.save_steps=2 evaluation.max_new_tokens=4"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        commands = ["label train.jsonl --out labels"]
        for run, settings in {"runs/mine": "", "runs/lora": "adapter.kind=lora alignment.weight=0"}.items():
            commands += [
                f"train data.train=train.jsonl labels.store=labels output={run} {budget} {settings}",
                f"eval test.jsonl --adapter {run}/adapter --out {run}",
            ]
        for command in commands:
            result = CliRunner().invoke(app, command.split())
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory, rows: Path, ranker_folder: Path) -> Path:
    """What pages take as downloaded."""
    folder = tmp_path_factory.mktemp("downloads")
    write_slake(folder / "Slake1.0", rows / "scan.png")
    write_checkpoints(folder)
    write_sam(folder / "models" / "sam")
    shutil.copytree(ranker_folder, folder / "models" / "biomedclip")
    return folder


def write_little(folder: Path, patients: Mapping[str, int], **settings: Any) -> dict[str, Path]:
    """`write_phantom` on the budget of a test, however many patients a page asks for."""
    return write_phantom(folder, {split: min(count, PATIENTS[split]) for split, count in patients.items()}, **settings)


@pytest.fixture
def provide(
    rows: Path, runs: Path, downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Puts into the current folder, which has the rows, what a command or program names and does not make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("a3tune.data.phantom.write_phantom", write_little)
    shutil.copytree(rows, tmp_path, dirs_exist_ok=True)
    places = {name: runs / name for name in ("labels", "runs/mine", "runs/lora")}
    places |= {
        "data/slake": rows,
        "runs/demo/data": rows,
        "runs/demo/lora": runs / "runs/lora",
        "runs/demo/a3tune": runs / "runs/mine",
    }
    places |= {
        path.relative_to(downloads).as_posix(): path for path in [*downloads.glob("[!m]*"), *downloads.glob("models/*")]
    }

    def provide(text: str) -> None:
        for name, source in places.items():
            named = re.search(rf"(?<![\w./-]){name}(?![\w.-])", text)
            made = re.search(rf"output={name}(\s|$)|^label (?!export|status).*--out {name}(\s|$)", text)
            if named and not made and not Path(name).exists():
                shutil.copytree(source, name)

    return provide


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("page", PAGES)
def test_a_page(page: str, provide: Provide):
    run_page(read_blocks(ROOT / page, page), provide)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str):
    check_prose(ROOT / page, page)


def test_there_is_something_to_run():
    blocks = [block for page in PAGES for block in read_blocks(ROOT / page, page)]
    running = Counter(block.language for block in blocks if block.runs)
    commands = [words for block in blocks if block.runs and block.language == "bash" for _, words in block.commands()]
    print(running, "not run:", sum(not block.runs for block in blocks))
    assert {"README.md", "docs/labels.md", "docs/decoding.md"} <= {block.page for block in blocks if block.runs}
    assert sum(words[0] == "a3tune" for words in commands) >= 30
    assert running["python"] >= 20 and running["yaml"] >= 3 and running["json"] >= 3
    assert len(EXAMPLES) >= 6 and len(RECIPES) >= 8
    assert sum(check_prose(ROOT / page, page) for page in PAGES) > 100


def test_every_public_name_has_an_example_that_runs_and_a_reference():
    page = "docs/api/index.md"
    code = "".join(block.text for block in read_blocks(ROOT / page, page) if block.runs and block.language == "python")
    named = [f"a3tune.{name}" for name in a3tune.__all__] + ["vlm.ask"]
    assert [name for name in named if not re.search(rf"\b{re.escape(name)}\b", code)] == []
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    described = {name.rpartition(".")[2] for name in re.findall(r"^::: (a3tune[\w.]+)", pages, re.M)}
    assert {*a3tune.__all__} - described == {"errors"}  # a module; its classes are


def test_what_the_api_pages_describe_is_there_and_linked():
    links = runpy.run_path(str(ROOT / "docs" / "links.py"))
    config = SimpleNamespace(docs_dir=str(ROOT / "docs"), extra={})
    links["on_config"](config)
    described = config.extra["described"]
    assert len(described) > 80
    assert [name for name in described.values() if not resolves(name)] == []
    html = "<code>load_vlm</code> <code>labels.top_k=2</code> <code>train</code> <code>no_such_name</code>"
    targets = re.findall(r'<autoref identifier="([^"]+)" optional><code>', links["on_page_content"](html, config))
    assert targets == ["a3tune.vlm.load.load_vlm", "a3tune.config.LabelsConfig.top_k"]


@pytest.mark.filterwarnings(PEFT_ASKS, "ignore:'pin_memory' argument is set")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for package, test in {"trl": "test_trl", "lightning": "test_lightning"}.items():
        if re.search(rf"^(from|import) {package}\b", example.read_text(), re.M):
            pytest.skip(f"tests/{test}.py runs it")
    monkeypatch.setattr(sys, "argv", [str(example), "--quick", "--out", "out"])
    runpy.run_path(str(example), run_name="__main__")  # a process would import PyTorch again


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_recipe_of_settings_is_read(recipe: Path):
    if "compute_environment" not in plain_yaml.load(recipe.read_text()):  # those are accelerate's
        load_config(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "```bash\n# nothing\na3tune train --confg x.yaml\n```",
            "page.md:3: a3tune train --confg x.yaml: .*No such option",
        ),
        ("```bash\na3tune trian\n```", "page.md:2: a3tune trian: .*No such command 'trian'"),
        (
            "```bash\na3tune ask 'Where?' \\\n    --image none.png\n```",
            "page.md:2: a3tune ask .*: exit code 2: .*none.png",
        ),
        ("```bash\na3tune train labels.topk=2\n```", "page.md:2: labels.topk=2: .*no such setting"),
        (
            "<!-- not run: a GPU -->\n```bash\na3tune train labels.topk=2\n```",
            "page.md:3: labels.topk=2: .*no such setting",
        ),
        ("```bash\na3tune eval x.jsonl --adapter none --out y --decode vdc\n```", "page.md:2: decode: expected one of"),
        ("```bash\na3tune label x.jsonl --out y labels.proposer=sma\n```", "page.md:2: labels.proposer: expected"),
        ("```bash\na3tune report runs/mine | less\n```", "page.md:2: one command on a line"),
        (
            "```bash\naccelerate launch -m a3tune train --confg x\n```",
            "page.md:2: a3tune train --confg x: .*No such option",
        ),
        ("```bash\nmake demmo\n```", "page.md:2: make demmo: no such target"),
        ("```bash\npip install 'a3tune[apps]'\n```", "page.md:2: .*expected extras of"),
        ("```bash\npython benchmarks/none.py\n```", "page.md:2: benchmarks/none.py: no such file"),
        ("```bash\npython benchmarks/labels.py --non\n```", "page.md:2: benchmarks/labels.py: no option --non"),
        ("```bash\nwget x\n```", "page.md:2: expected a3tune, .*, got wget"),
        ("```python\na = 1\n\nassert a == 2\n```", "page.md:4: .*AssertionError"),
        ("```python\na = (\n```", "page.md:2: .*never closed"),
        (
            "<!-- not run: a GPU -->\n```python\nfrom a3tune.evaluation.evaluate import evaluat\n```",
            "page.md:3: a3tune.evaluation.evaluate.evaluat",
        ),
        ("```yaml\nlabels: {topk: 2}\n```", "page.md:2: .*labels.topk: no such setting"),
        ("```yaml\nmodels: {}\ndatas: {}\n```", "page.md:2: .*expected a mapping with models, data and settings"),
        ('```json\n{"id": "1", "prompt": "Where?"}\n```', "page.md:2: .*answer: expected"),
        ("```json\n{\n```", "page.md:2: "),
        ("```\na3tune demo\n```", "page.md:1: expected a block tagged"),
        ("```sh\na3tune demo\n```", "page.md:1: expected a block tagged"),
        ("Text.\n\n    a3tune demo\n", "page.md:3: an indented block"),
        ("1. First\n\n   ```bash\n   a3tune demo\n   ```\n", "page.md:3: an indented block"),
        ("<!-- no run: a GPU -->\n```bash\na3tune demo\n```", "page.md:1: expected <!-- not run: WHY -->"),
    ],
)
def test_what_is_wrong_with_a_page_is_said_with_its_place(text: str, message: str, provide: Provide, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(Wrong, match=f"(?s)^{message}"):
        run_page(read_blocks(page, page.name), provide)


@pytest.mark.parametrize(
    "name",
    [
        "a3tune trian",
        "a3tune train --confg",
        "labels.topk",
        "labels.topk=2",
        "a3tune.evaluation.evaluate.evaluat",
        "tests/none.py",
    ],
)
def test_a_name_that_is_not_there_is_told(name: str, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"A line.\n\nSee `{name}`.\n")
    with pytest.raises(Wrong, match=f"page.md:3 .*`{name}`"):
        check_prose(page, page.name)


def test_blocks_of_a_page_follow_one_another(provide: Provide, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "```yaml\n# settings.yaml\nlabels: {top_k: 1}\n```\n\n"
        "```bash\na3tune label train.jsonl --out labels -c settings.yaml\n```\n\n"
        "```python\nfrom pathlib import Path\nmade = Path('labels').is_dir()\n```\n\n```python\nassert made\n```\n"
    )
    run_page(read_blocks(page, page.name), provide)
