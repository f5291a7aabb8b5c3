"""Repositories that a user names: out of the cache, or downloaded; what cannot be had is told in one line, soon."""

import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from a3tune.errors import ModelError
from a3tune.machine.hub import Repository, cached, fetch, named, pinned
from hubs import NOBODY, Hub, ask, serving

FILES = {"config.json": b"{}", "model.safetensors": b"w", "pytorch_model.bin": b"x" * 99, "sub/[1].json": b"1"}


def wanted(names) -> list[str]:
    found = [name for name in names if name.endswith(".safetensors")]
    if not found:
        raise ValueError("no weights")
    return ["*.json", *found]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        hub.add("models/own/model", FILES)
        ask(monkeypatch, hub.address, tmp_path / "cache")
        yield hub


def model(revision: str | None = None, name: str = "own/model") -> Repository:
    return Repository(name, revision, "model")


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [
        ("facebook/sam-vit-base", "facebook/sam-vit-base", None),
        ("a/b.c@main", "a/b.c", "main"),
        ("a/b@refs/convert/parquet", "a/b", "refs/convert/parquet"),
        ("a/b@v1.0", "a/b", "v1.0"),
    ],
)
def test_names_of_the_hub(text, name, revision):
    found = named(text, "dataset")
    assert found is not None and (found.name, found.revision, str(found)) == (name, revision, text)


@pytest.mark.parametrize(
    "text", ["tiny", "./a/b", "/a/b", "a/b/c", "~/b", "here/b", "here/b@x", "a/b@../x", "a/b@", "a"]
)
def test_what_is_a_path(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert named(text, "model") is None


def test_what_is_wanted_is_downloaded_once(hub):
    assert cached(model(), wanted) is None and hub.asked == []
    found = fetch(model(), wanted, ModelError)
    there = sorted(path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file())
    assert there == ["config.json", "model.safetensors", "sub/[1].json"] and found.whole
    assert pinned("own/model", "model", found.folder) == f"own/model@{found.commit}"
    asked = len(hub.asked)
    assert (
        fetch(model(), wanted, ModelError)
        == cached(model(), wanted)
        == found
        == fetch(model(found.commit), wanted, ModelError)
    )
    assert len(hub.asked) == asked


def test_another_revision_is_another_commit(hub):
    old = fetch(model(), wanted, ModelError)
    new = hub.add("models/own/model", FILES | {"model.safetensors": b"other"}, "v2")
    assert fetch(model("v2"), wanted, ModelError).commit == new != old.commit
    assert (fetch(model(new), wanted, ModelError).folder / "model.safetensors").read_bytes() == b"other"
    assert fetch(model(), wanted, ModelError) == old


def test_a_download_that_broke_off_goes_on(hub, monkeypatch):
    whole = fetch(model(), wanted, ModelError)
    (whole.folder / "config.json").unlink()
    assert cached(model(), wanted) is None
    ask(monkeypatch, NOBODY, whole.folder.parents[2])
    with pytest.raises(ModelError, match="cannot be reached"):
        fetch(model(), wanted, ModelError)
    ask(monkeypatch, hub.address, whole.folder.parents[2])
    assert (fetch(model(), wanted, ModelError).folder / "config.json").is_file()


def test_a_cache_that_others_filled(hub, tmp_path, monkeypatch):
    """It does not say what the repository has: asked for news, but where that is forbidden."""
    whole = fetch(model(), wanted, ModelError)
    place = tmp_path / "others" / "models--own--model"
    shutil.copytree(whole.folder, place / "snapshots" / whole.commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(whole.commit)
    ask(monkeypatch, NOBODY, tmp_path / "others", offline=True)
    found = fetch(model(), wanted, ModelError)
    assert found == cached(model(), wanted) and found.commit == whole.commit and not found.whole
    (found.folder / "model.safetensors").unlink()
    assert cached(model(), wanted) is None
    ask(monkeypatch, hub.address, tmp_path / "others")
    assert fetch(model(), wanted, ModelError).whole and (found.folder / "model.safetensors").is_file()


def silent(*arguments: object, **options: object) -> None:
    """A name server that says nothing, for longer than one waits."""
    time.sleep(3)
    raise OSError


def test_what_cannot_be_had_is_told_in_one_line(hub, tmp_path, monkeypatch):
    hub.add("models/own/pickled", {"config.json": b"{}", "pytorch_model.bin": b""})
    for repository, line in (
        (
            model(name="own/none"),
            r"own/none: is no path here, and the Hugging Face Hub has no such model.*hf auth login",
        ),
        (model("v9"), "own/model@v9: the Hugging Face Hub has no such revision"),
        (model(name="own/pickled"), "own/pickled: no weights"),
        (model(name="a--b/c"), "a--b/c: downloading it failed"),
    ):
        with pytest.raises(ModelError, match=line) as told:
            fetch(repository, wanted, ModelError)
        assert "\n" not in str(told.value) and len(str(told.value)) < 450
    hub.breaks = True
    with pytest.raises(ModelError, match=r"own/model@v1: downloading it failed: .*; what came is kept"):
        fetch(model("v1"), wanted, ModelError)
    for address, offline, line in (
        (NOBODY, False, r"own/model@v1: .* cannot be reached .*HF_HUB_OFFLINE=1 takes what was downloaded before"),
        (NOBODY, True, r"own/model@v1: .*HF_HUB_OFFLINE is set: unset it, or fetch it elsewhere"),
        ("http://no-such-host.invalid", False, "cannot be reached"),
    ):
        ask(monkeypatch, address, tmp_path / "empty", offline=offline)
        start = time.monotonic()
        with pytest.raises(ModelError, match=line) as told:
            fetch(model("v1"), wanted, ModelError)
        assert time.monotonic() - start < 3 and "\n" not in str(told.value)
    monkeypatch.setattr("a3tune.machine.hub.create_connection", silent)
    with pytest.raises(ModelError, match="cannot be reached"):
        fetch(model("v1"), wanted, ModelError)
    assert time.monotonic() - start < 4
    assert "hf download own/model --revision v1 --local-dir DIR" in str(told.value)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal(hub, monkeypatch, terminal):
    """Whatever the libraries were told: commands turn the Hub's own bars off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", screen)
    fetch(model(), wanted, ModelError)
    assert ("Fetching 3 files" in screen.getvalue()) is terminal
