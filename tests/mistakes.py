"""What users get wrong, command by command, in a folder that has what the commands take: what it costs to be told.

`test_startup.py` tells whether they are told at once, `benchmarks/startup.py` how long it takes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image

from a3tune.config import dump_config, load_config
from a3tune.data.rows import read_rows, write_rows
from a3tune.evaluation.predictions import Cost, PredictionLog
from a3tune.evaluation.results import make_prediction
from a3tune.labels.stored import StoredSettings
from a3tune.models import A3MOE
from a3tune.run.folder import RunFolder
from a3tune.types import Sample

ROWS, ADAPTER, NO_ADAPTER = "rows.jsonl", "run/adapter", ("--adapter", "none")
UNLABELLED = ("labels.source=none",)
VALIDATED = (f"data.train={ROWS}", *UNLABELLED, f"data.validation={ROWS}", "training.eval_steps=5")

NO_HUB = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/nowhere"}
"""Environment in which mistakes are made: no model and no data set of the Hub is at hand."""

MISTAKES: dict[str, tuple[Sequence[str], str]] = {
    "no such command": (["trian"], "Did you mean"),
    "demo: setting": (["demo", "training.epoch=1"], "did you mean training.epochs"),
    "demo: patients": (["demo", "patients.dev=1"], "expected one of patients.train"),
    "demo: folder not ours": (["demo", "--out", "thesis"], "not ours"),
    "demo: ranker": (["demo", "labels.ranker=nosuch"], "expected the folder of a ranker"),
    "demo: decoding method": (["demo", "evaluation.decode=vcdd"], "vcd, dola"),
    "sweep: no values": (["sweep", "--out", "out", "--vary", "alignment.weight"], "expected NAME=VALUE,VALUE"),
    "sweep: setting": (
        ["sweep", "--out", "out", "--vary", "alignment.wait=1", f"data.train={ROWS}"],
        "no such setting",
    ),
    "sweep: seed": (["sweep", "--out", "out", "--vary", "training.seed=1,2"], "--seed does"),
    "sweep: no validation rows": (
        ["sweep", "--out", "out", "--vary", "alignment.weight=1,2", f"data.train={ROWS}", "labels.source=truth"],
        "data.validation: expected a file of rows",
    ),
    "sweep: nothing that counts": (
        ["sweep", "--out", "out", "--vary", "labels.top_k=1,2", f"data.train={ROWS}", "labels.source=truth"],
        "--vary labels.top_k: changes nothing, because labels.source is truth",
    ),
    "sweep: validation rows are learnt from": (
        ["sweep", "--out", "out", "--vary", "labels.top_k=1", f"data.train={ROWS}", f"data.validation={ROWS}"],
        "holds the rows of data.train",
    ),
    "sweep: score": (["sweep", "--out", "out", "--vary", "labels.top_k=1", "--score", "nosuch"], "--score nosuch"),
    "data check: folder": (["data", "check", "nosuch"], "expected the folder of a data set"),
    "data check: name": (["data", "check", "thesis", "--name", "nosuch"], "nosuch"),
    "data check: labels": (["data", "check", ROWS, "--labels", "nosuch"], "nosuch: expected finished region labels"),
    "data check: model": (["data", "check", ROWS, "--model", "nosuch"], "there is no such folder"),
    "data prepare: folder": (["data", "prepare", "nosuch", "--out", "out"], "expected the folder of a data set"),
    "data prepare: unknown layout": (["data", "prepare", "thesis", "--out", "out"], "thesis"),
    "data import: source": (["data", "import", "nosuch.csv", "--out", "out"], "nosuch.csv: expected a table"),
    "data import: Hub, offline": (["data", "import", "own/questions", "--out", "out"], "HF_HUB_OFFLINE is set"),
    "data import: like a path": (["data", "import", "no/such.csv", "--out", "out"], "no/such.csv: expected a table"),
    "data import: column": (["data", "import", ROWS, "--out", "out", "--map", "question=Frage"], "no such column"),
    "data import: map": (["data", "import", ROWS, "--out", "out", "--map", "question"], "FIELD=COLUMN"),
    "data import: split": (["data", "import", ROWS, "--out", "out", "--split", "8/1/1"], "sum to 1"),
    "data import: no images": (["data", "import", "broken.jsonl", "--out", "out"], "none of 1 can be used"),
    "data regions: rows": (["data", "regions", "no.jsonl", "--masks", "m.json", "--out", "o.jsonl"], "a JSONL file"),
    "data regions: masks": (["data", "regions", ROWS, "--masks", "m.json", "--out", "o.jsonl"], "m.json"),
    "data regions: output": (["data", "regions", ROWS, "--masks", "m.json", "--out", ROWS], "--force"),
    "convert: folder": (["convert", "nosuch", "--out", "out"], "expected a model's folder"),
    "convert: kind": (["convert", "bert", "--out", "out"], "cannot be converted"),
    "convert: weights": (["convert", "huatuo", "--out", "out"], "Download the weights too"),
    "convert: no base": (["convert", "delta", "--out", "out"], "LLaMA-7B"),
    "label: rows": (["label", "no.jsonl", "--out", "labels"], "expected a JSONL file"),
    "label: row": (["label", "broken.jsonl", "--out", "labels"], "prompt"),
    "label: no rows": (["label", "empty.jsonl", "--out", "labels"], "empty.jsonl: expected at least one row"),
    "label: query": (["label", ROWS, "--out", "labels", "labels.query='{organ} {question}'"], "meta field 'organ'"),
    "label: query, dry run": (
        ["label", ROWS, "--out", "o", "labels.query='{organ}'", "--dry-run"],
        "meta field 'organ'",
    ),
    "label: setting": (["label", ROWS, "--out", "labels", "labels.topk=2"], "did you mean labels.top_k"),
    "label: segmenter": (["label", ROWS, "--out", "labels", "labels.proposer=samm"], "superpixels, regions, sam"),
    "label: ranker": (["label", ROWS, "--out", "labels", "labels.ranker=nosuch"], "expected the folder of a ranker"),
    "label: ranker of the Hub, offline": (
        ["label", ROWS, "--out", "labels", "labels.ranker=own/clip"],
        "HF_HUB_OFFLINE",
    ),
    "label: visual prompt": (["label", ROWS, "--out", "labels", "labels.visual_prompt=red"], "visual_prompt"),
    "label: no weights": (["label", ROWS, "--out", "o", "labels.proposer=sam"], "expected the folder of its model"),
    "label: useless weights": (["label", ROWS, "--out", "o", "labels.weights=bert"], "needs no weights"),
    "label: weights": (["label", ROWS, "--out", "o", "labels.proposer=sam", "labels.weights=no"], "no: expected"),
    "label: empty weights": (
        ["label", ROWS, "--out", "o", "labels.proposer=sam", "labels.weights=empty"],
        "empty: expected the folder of a model with a config.json, found none",
    ),
    "label status: store": (["label", "status", "nosuch"], "expected finished region labels, found none"),
    "label show: store": (["label", "show", "nosuch", ROWS], "found none"),
    "label show: output": (["label", "show", "nosuch", ROWS, "--out", ROWS], "--force"),
    "label export: store": (["label", "export", "nosuch", ROWS, "--out", "o.json"], "found none"),
    "label export: output": (["label", "export", "nosuch", ROWS, "--out", ROWS], "--force"),
    "label export: setting": (["label", "export", "nosuch", ROWS, "--out", "o", "labels.topk=1"], "labels.top_k"),
    "train: no rows": (["train"], "add data.train=FILE.jsonl"),
    "train: rows": (["train", "data.train=no.jsonl"], "expected a JSONL file"),
    "train: empty rows": (["train", "data.train=empty.jsonl", *UNLABELLED], "empty.jsonl: expected at least one row"),
    "train: validation": (
        ["train", f"data.train={ROWS}", *UNLABELLED, "data.validation=no.jsonl"],
        "no.jsonl: expected a JSONL file",
    ),
    "train: empty validation": (
        ["train", f"data.train={ROWS}", *UNLABELLED, "data.validation=empty.jsonl", "training.eval_steps=5"],
        "empty.jsonl: expected at least one row",
    ),
    "train: no validation": (
        ["train", f"data.train={ROWS}", *UNLABELLED, "training.eval_steps=5"],
        "add data.validation=FILE.jsonl",
    ),
    "train: score": (
        ["train", *VALIDATED, "training.keep_best=closed_acuracy"],
        "did you mean closed_accuracy",
    ),
    "train: score that no row has": (["train", *VALIDATED, "training.keep_best=closed_accuracy"], "no question has it"),
    "train: tracker": (["train", *VALIDATED, "training.report_to=tensorbord"], "did you mean tensorboard"),
    "train: tracker that is not there": (
        ["train", *VALIDATED, "training.report_to=neptune"],
        "neptune is not installed; pip install neptune",
    ),
    "train: patience": (["train", *VALIDATED, "training.patience=2"], "keep_best names no score"),
    "train: lr": (["train", "training.lr=1e-4"], "did you mean training.learning_rate?"),
    "train: timed steps": (["train", *VALIDATED, "--timed-steps", "3"], "expected with --dry-run"),
    "train: rows, dry run": (["train", "data.train=no.jsonl", "--dry-run"], "expected a JSONL file"),
    "train: heads": (
        ["train", f"data.train={ROWS}", "labels.source=truth", "alignment.heads=9999", "--dry-run"],
        "alignment.heads: expected at most",
    ),
    "train: model like a path": (
        ["train", f"data.train={ROWS}", *UNLABELLED, "model.path=thesis/llava"],
        "no such folder",
    ),
    "train: model like nothing": (["train", f"data.train={ROWS}", *UNLABELLED, "model.path=llava"], "owner/model"),
    "train: model of the LLaVA code": (
        ["train", f"data.train={ROWS}", *UNLABELLED, "model.path=delta"],
        "`a3tune convert delta --out models/delta`, then model.path=models/delta",
    ),
    "train: config": (["train", "--config", "no.yaml"], "expected a YAML file"),
    "train: labels": (["train", f"data.train={ROWS}"], "make them with `a3tune label`"),
    "train: labels of other settings": (
        ["train", f"data.train={ROWS}", "labels.store=store", "labels.proposer=sam"],
        "labels.proposer is sam",
    ),
    "train: model": (["train", f"data.train={ROWS}", "labels.source=none", "model.path=/no/such"], "/no/such"),
    "train: folder not ours": (["train", f"data.train={ROWS}", "labels.source=none", "output=thesis"], "not ours"),
    "eval: rows": (["eval", "no.jsonl", *NO_ADAPTER, "--out", "out"], "expected a JSONL file"),
    "eval: no rows": (["eval", "empty.jsonl", *NO_ADAPTER, "--out", "out"], "empty.jsonl: expected at least one row"),
    "eval: heads": (
        ["eval", ROWS, *NO_ADAPTER, "--out", "out", "evaluation.heads=9999", "--dry-run"],
        "evaluation.heads: expected at most",
    ),
    "eval: adapter": (["eval", ROWS, "--adapter", "nosuch", "--out", "out"], "nosuch: expected an adapter folder"),
    "eval: adapter of another kind": (["eval", ROWS, "--adapter", "odd", "--out", "out"], "got 'IA3'"),
    "eval: decoding method": (["eval", ROWS, *NO_ADAPTER, "--out", "out", "--decode", "vcdd"], "vcd, dola"),
    "eval: strategy": (["eval", ROWS, *NO_ADAPTER, "--out", "o", "evaluation.strategy=best"], "nucleus"),
    "eval: fillings": (
        ["eval", ROWS, *NO_ADAPTER, "--out", "o", "evaluation.fillings=mean,fog"],
        "evaluation.fillings: expected one or more of mean, blur, noise",
    ),
    "eval: nothing to hide": (
        ["eval", "nowhere.jsonl", *NO_ADAPTER, "--out", "o", "--occlude"],
        "expected some to hide, got an empty list",
    ),
    "eval: ranker of what to hide": (
        ["eval", ROWS, *NO_ADAPTER, "--out", "o", "--occlude", "labels.ranker=nosuch"],
        "nosuch",
    ),
    "eval: weights": (["eval", ROWS, *NO_ADAPTER, "--out", "o", "evaluation.weights={rouge: x}"], "radgraph"),
    "eval: folder not ours": (["eval", ROWS, *NO_ADAPTER, "--out", "thesis"], "not ours"),
    "eval: same adapter twice": (["eval", ROWS, *NO_ADAPTER, *NO_ADAPTER, "--out", "out"], "different names"),
    "ask: image": (["ask", "Where?", "--image", "no.png"], "no.png"),
    "ask: adapter": (["ask", "Where?", "--image", "scan.png", "--adapter", "nosuch"], "an adapter folder"),
    "ask: output": (["ask", "Where?", "--image", "scan.png", "--out", "scan.png"], "--force"),
    "app: adapter": (["app", "--adapter", "nosuch"], "expected an adapter folder"),
    "app: model": (["app", "model.path=./nosuch"], "./nosuch"),
    "serve: adapter": (["serve", "--adapter", "mine=nosuch"], "expected an adapter folder"),
    "serve: adapter without a name": (["serve", "--adapter", ADAPTER], "expected NAME=DIR"),
    "serve: model": (["serve", "model.path=./nosuch"], "./nosuch"),
    "serve: no token": (["serve", "--host", "0.0.0.0"], "a token is needed"),
    "serve: token": (["serve", "--token-file", "nosuch"], "--token-file nosuch"),
    "serve: empty token": (["serve", "--token-file", "empty.jsonl"], "expected at least 16"),
    "serve: decoding method": (["serve", "evaluation.decode=vcdd"], "vcd, dola"),
    "env: argument": (["env", "all"], "unexpected extra argument"),
    "report: run": (["report", "nosuch"], "expected the folder of a run"),
    "report: not evaluated": (["report", "run"], "a3tune eval"),
    "report: folder not ours": (["report", "thesis"], "not ours"),
    "report: output": (["report", "run", "--out", ROWS], "--force"),
    "compare: run": (["compare", "nosuch"], "expected the folder of a run"),
    "compare: not evaluated": (["compare", "run"], "a3tune eval"),
    "compare: form": (["compare", "first", "--out", "table.doc"], ".tex"),
    "compare: field": (["compare", "first", "second", "--by", "hospital"], "meta.hospital"),
    "merge: adapter": (["merge", "nosuch", "--out", "out"], "expected an adapter folder"),
    "merge: routed": (["merge", ADAPTER, "--out", "out"], "cannot be merged"),
    "merge: output": (["merge", "plain", "--out", "thesis"], "--force"),
    "clean: run": (["clean", "nosuch"], "expected the folder of a run"),
    "clean: folder not ours": (["clean", "thesis"], "not ours"),
    "reproduce: name": (["reproduce", "table99"], "table99"),
    "reproduce: places": (["reproduce", "table1", "--on", "no.yaml"], "no.yaml"),
    "reproduce: model": (["reproduce", "table1", "--model", "gpt"], "--model NAME, of llava-med, llava-med-1.5"),
    "reproduce: setting": (["reproduce", "table1", "--set", "labels.topk=1"], "labels.top_k"),
}
"""What is wrong -> the command line in the folder of `scene`, and a part of what it is told."""


def scene(folder: Path) -> None:
    """Rows and an image, two evaluated runs and one that is not, adapters, labels, checkpoints, a folder not ours."""
    Image.new("RGB", (8, 8)).save(folder / "scan.png")
    asked = Sample("first", folder / "scan.png", "Where is the lesion?", "left", "open", meta={"modality": "CT"})
    write_rows(folder / ROWS, [asked, replace(asked, id="second")])
    write_rows(folder / "nowhere.jsonl", [replace(asked, regions=())])
    (folder / "empty.jsonl").write_text("\n")
    (folder / "broken.jsonl").write_text('{"id": "a", "image": "scan.png", "answer": "left"}\n')
    _write(folder / "thesis" / "thesis.txt", "years of work")
    _write(folder / "bert" / "config.json", {"model_type": "bert"})
    _write(folder / "huatuo" / "config.json", {"model_type": "llava_qwen2"})
    _write(folder / "delta" / "config.json", {"model_type": "llava", "hidden_size": 8})
    RunFolder.create(folder / "run")
    for name, kind in ((ADAPTER, A3MOE), ("plain", "LORA"), ("odd", "IA3")):
        settings = {"peft_type": kind, "base_model_name_or_path": "tiny"}
        _write(folder / name / "adapter_config.json", settings)
        _write(folder / name / "adapter_model.safetensors", "")
    for name in ("first", "second"):
        _evaluated(folder / name, folder / ROWS)
    _labels(folder / "store")


def _evaluated(path: Path, rows: Path) -> None:
    run, samples = RunFolder.create(path), read_rows(rows)
    run.write_text(run.evaluation.name, dump_config(load_config(None, [f"data.test={rows}", f"output={path}"])))
    log = PredictionLog(run, {sample.id: sample for sample in samples})
    log.add([(make_prediction(sample, "left"), np.ones(4, np.float16)) for sample in samples], Cost(1.0, 1.0, 2.0))


def _labels(store: Path) -> None:
    settings = {"proposer": {"name": "superpixels"}, "visual_prompt": "dim", "ranker": {"name": "clip"}}
    found = StoredSettings("s", "r", "{question}", settings, {})
    _write(store / "settings" / f"{found.name}.json", asdict(found))


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
