import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest

from a3tune.config import RunConfig, load_config
from a3tune.errors import ConfigError, RunError
from a3tune.machine.digests import unsealed
from a3tune.run.folder import RunFolder, environment
from a3tune.training.resume import refuse_other_settings


def test_new_empty_and_own_folders_are_taken(tmp_path):
    folder = RunFolder.create(tmp_path / "a" / "b")
    assert RunFolder.create(folder.path) == RunFolder.open(folder.path) == folder
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty").path.is_dir()


@pytest.mark.parametrize("marker", [None, "", "{}", "[1]", "no json", '{"schema": 99}'])
def test_a_folder_that_is_not_ours_is_refused_and_kept(tmp_path, marker):
    (tmp_path / "thesis.txt").write_text("years of work")
    if marker is not None:
        (tmp_path / "a3tune.json").write_text(marker)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for claim in (RunFolder.create, RunFolder.open):
        with pytest.raises(RunError, match="choose another"):
            claim(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="this is a file"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(RunError, match=r"below/deeper: expected an output folder, .*/file is a file"):
        RunFolder.create(tmp_path / "file" / "below" / "deeper")
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder.create(Path("/proc/nobody") / "makes")
    with pytest.raises(RunError, match="there is none"):
        RunFolder.open(tmp_path / "none")


def hold(path: Path, ready) -> None:
    with RunFolder.open(path).lock():
        ready.set()
        signal.pause()


def test_second_run_is_refused_until_the_first_ends_however_it_ends(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(folder.path, ready), daemon=True)
    process.start()
    assert ready.wait(60)
    with pytest.raises(RunError, match=f"in use by another run \\(process {process.pid} on"), folder.lock():
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with folder.lock():
        assert str(os.getpid()) in (folder.path / ".lock").read_text()
    assert (folder.path / ".lock").read_text() == ""


def test_lock_is_released_on_error_and_refused_within_one_process(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), folder.lock():
        raise ZeroDivisionError
    with folder.lock(), pytest.raises(RunError, match="in use"), folder.lock():
        pass


def test_config_round_trip(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(RunError, match="train first"):
        folder.read_config()
    config = load_config(None, ["labels.top_k=7", f"output={folder.path}"])
    folder.write_config(config)
    assert folder.read_config() == config != RunConfig()
    folder.config.write_text("labels: {top_k: 0}")
    with pytest.raises(ConfigError, match="top_k"):
        folder.read_config()


def test_a_run_of_before_a_setting_has_what_was_done_then(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config(load_config(None, ["alignment.weight=1"]))
    assert folder.read_config().alignment.until == 0.5
    folder.config.write_text(folder.config.read_text().replace("  until: 0.5\n", ""))
    assert folder.read_config().alignment.until is None
    with pytest.raises(RunError, match=r"alignment\.until was null, now 0\.5"):
        refuse_other_settings(folder, load_config(None, ["alignment.weight=1"]))


def test_environment_names_versions_and_nobody(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    text = folder.write_environment().read_text()
    assert unsealed(json.loads(text)) == environment()
    assert set(json.loads(text)["packages"]) >= {"torch", "transformers", "peft"}
    for private in (socket.gethostname(), str(Path.home()) + "/", str(Path.cwd())):
        assert private not in text


def test_json_is_json(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    assert unsealed(json.loads(folder.write_json("results.json", {"é": 1}).read_text(encoding="utf-8"))) == {"é": 1}
    with pytest.raises(ValueError, match="JSON"):
        folder.write_json("results.json", {"x": float("nan")})
    assert unsealed(json.loads(folder.results.read_text(encoding="utf-8"))) == {"é": 1}
