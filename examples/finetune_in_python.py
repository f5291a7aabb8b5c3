"""The whole chain from Python: scans, labels, training, measuring; what `a3tune label`, `train`, `eval` do, as calls.

    python examples/finetune_in_python.py --quick --out out

With --quick it takes two steps on one patient, to show that it runs; without, about four minutes on two cores.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from a3tune.adapters import load_adapter
from a3tune.commands.label import label
from a3tune.commands.train import fine_tune
from a3tune.config import load_config
from a3tune.data.phantom import write_phantom
from a3tune.data.rows import read_rows
from a3tune.evaluation.evaluate import evaluate
from a3tune.vlm.load import load_vlm


def main(out: Path, quick: bool) -> None:
    patients = {"train": 1, "test": 1} if quick else {"train": 60, "test": 30}
    files = write_phantom(out / "scans", patients)
    config = load_config(
        None,
        [
            f"data.train={files['train']}",
            f"labels.store={out / 'labels'}",
            f"output={out / 'run'}",
            "adapter.rank=16",
            "adapter.expert_rank=4",
            "alignment.weight=3",
            "training.learning_rate=3e-3",
            "training.batch_size=16",
            f"training.max_steps={2 if quick else 120}",
        ],
    )
    _, quality = label(config, lambda done, total: None)
    print(
        f"weak labels: the true region is among the best {config.labels.top_k} for {100 * quality['all'].recall:.0f} %"
    )
    run = fine_tune(config, lambda done, total: None, synthetic=True)

    samples = read_rows(files["test"])
    base = load_vlm(config.model.path)
    before = evaluate(base, samples, config.active_evaluation)
    tuned = replace(base, model=load_adapter(base.model, run / "adapter"))
    after = evaluate(tuned, samples, config.active_evaluation)
    for name in ("open_recall", "closed_accuracy", "attention_mass"):
        print(
            f"{name:16} base {100 * before.metrics[name].mean:5.1f} %   tuned {100 * after.metrics[name].mean:5.1f} %"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for everything it writes")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
