"""Attention alignment in Lightning. It is no dependency: `make test-trainers` has an environment for it."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader

from a3tune.adapters import A3MoEConfig
from a3tune.training.step import Alignment
from documents import read_blocks
from first_step import first_step_of_command
from trainings import fresh_vlm, samples

lightning = pytest.importorskip("lightning", reason="make test-trainers")
LEARNING_RATE = 0.1
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"r": 4, "expert_rank": 2, "query_experts": 2, "key_experts": 3, "router_hidden": 8}
pytestmark = [
    # PEFT 0.21 asks the model by a name that transformers has deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Lightning 2.6 looks at batches by a name that torch has deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    # What it recommends: more processes that load data, TensorBoard; and what it says of a new run in an older folder.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    path = ROOT / "examples" / "align_lightning.py"
    assert len(path.read_text().splitlines()) <= 42
    return runpy.run_path(str(path))


class Tiny(lightning.LightningModule):
    """The module of the example over the smallest model, with SGD: a step is the gradient."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        vlm, self.history = fresh_vlm(), []
        torch.manual_seed(3)
        self.model = get_peft_model(vlm.model, A3MoEConfig(**SMALL)).train()
        self.align = Alignment(self.model, vlm.processor, **{"heads": 3, "weight": 0.5} | settings)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["alignment"] = self.align.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.align.load_state_dict(checkpoint["alignment"])


@pytest.fixture(scope="module")
def tiny(example: dict[str, Any]) -> Any:
    return type("Mine", (Tiny,), {"training_step": example["MyModule"].training_step})


def fit(module: Any, folder: Path, *, batch: int = 2, resume: Any = None, **settings: Any) -> Any:
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=folder, **QUIET | settings)
    trainer.fit(module, DataLoader(samples(4), batch, collate_fn=module.align.collate), ckpt_path=resume)
    return trainer


def test_the_example_loses_what_the_command_line_does(example: dict[str, Any], tmp_path: Path) -> None:
    found = example["main"](tmp_path / "lightning", True)
    _, line = first_step_of_command(tmp_path)
    assert found[0] == pytest.approx(line["loss"], rel=1e-6)
    assert found[1] < found[0]
    logged = next((tmp_path / "lightning").rglob("metrics.csv")).read_text().splitlines()
    assert {"loss", "loss_llm", "loss_align"} <= set(logged[0].split(","))
    first = dict(zip(logged[0].split(","), logged[1].split(","), strict=True))
    assert float(first["loss_align"]) == pytest.approx(line["loss_align"], rel=1e-6)


def test_it_goes_on_from_a_checkpoint(tiny: Any, tmp_path: Path) -> None:
    whole, first, rest = (tiny(head_selection="running") for _ in range(3))
    fit(whole, tmp_path / "whole", max_epochs=3)
    fit(first, tmp_path / "parts", max_epochs=1)
    (checkpoint,) = (tmp_path / "parts").rglob("*.ckpt")
    fit(rest, tmp_path / "parts", max_epochs=3, resume=checkpoint)
    assert first.history + rest.history == whole.history
    scores = [module.align.selector.state_dict()["score_LH"] for module in (rest, whole)]
    assert torch.equal(*scores)


def gradient(module: Any, cuts: list[list[Any]], together: bool) -> dict[str, torch.Tensor]:
    """Of a plain loop over these batches: of the mean over all samples, or of the mean of the batches' means."""
    batches = [module.align.collate(rows) for rows in cuts]
    counts = module.align.count(batches)
    for batch in batches:
        loss, _ = module.align.loss(module.model, batch, counts if together else None)
        (loss if together else loss / len(batches)).backward()
    return {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}


def assert_stepped(module: Any, start: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    now = module.model.state_dict()
    assert any(value.any() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close((start[name] - now[name]) / LEARNING_RATE, value, atol=1e-4, rtol=1e-3, msg=name)


def test_its_own_accumulation_is_a_mean_of_means(tiny: Any, tmp_path: Path) -> None:
    module, plain = fixed(tiny), fixed(tiny)
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    fit(module, tmp_path, batch=3, max_steps=1, accumulate_grad_batches=2)
    cuts = [samples(4)[:3], samples(4)[3:]]
    assert_stepped(module, start, gradient(plain, cuts, together=False))
    with pytest.raises(AssertionError):
        assert_stepped(module, start, gradient(fixed(tiny), cuts, together=True))


def test_the_module_of_the_page_takes_the_mean_over_the_step(tiny: Any, tmp_path: Path) -> None:
    page = "docs/howto/own-trainer.md"
    (block,) = (one for one in read_blocks(ROOT / page, page) if "import lightning" in one.text)
    shown: dict[str, Any] = {}
    exec(block.text, shown)
    whole = fixed(tiny)
    module = shown["InParts"](whole.model, whole.align)
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    module.configure_optimizers = whole.configure_optimizers
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, max_steps=1, **QUIET)
    trainer.fit(module, DataLoader(samples(4), 4, collate_fn=module.collate))
    assert_stepped(module, start, gradient(fixed(tiny), [samples(4)], together=True))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert torch.equal(torch.load(checkpoint)["alignment"]["heads_LH"], whole.align.heads_LH)  # noqa: TID251


def fixed(tiny: Any) -> Any:
    module = tiny(head_selection="fixed")
    module.align.selector.fix([(0, 1), (1, 0), (1, 3)], (2, 4))
    return module
