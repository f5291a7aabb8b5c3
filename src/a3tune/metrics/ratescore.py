"""RaTEScore (Zhao et al., 2024): similarity of the medical entities of two reports, by its own package."""

from pathlib import Path

from a3tune.metrics.folders import required, run_script
from a3tune.metrics.text import Scores, Texts

_MODELS = ("Angelakeke/RaTE-NER-Deberta", "FremyCompany/BioLORD-2023-C")
_HOW = (
    "make an environment FOLDER/venv with `pip install RaTEScore==0.6.0 medspacy pandas torch 'transformers<5' "
    "'numpy<2'`; where there is a network, run `hf download NAME --local-dir FOLDER/NAME` for "
    f"{' and '.join(_MODELS)}, then give FOLDER as ratescore"
)


def ratescore(predictions: Texts, references: Texts, folder: Path | None = None) -> Scores:
    """The package's default score: `ratescore`, in [0, 1]; 0.5 if a side has no entities.

    Args:
        folder: both models under their own names, and `venv/` if the package is there.

    Raises:
        ModelError: the folder does not hold that, or the package failed.
    """
    folder = required(folder, [f"{model}/config.json" for model in _MODELS], _HOW)
    return {"ratescore": run_script("score_ratescore", folder, [predictions, references], _HOW)}
