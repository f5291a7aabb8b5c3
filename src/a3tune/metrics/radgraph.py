"""RadGraph F1 (Jain et al., 2021; Yu et al., 2023): overlap of clinical entities and relations of two reports.

Knows annotations, `{"entities": {id: {"tokens", "label", "relations": [[type, id of the other], ...]}}}`, as the
radgraph package gives them; `scripts/annotate_radgraph.py` has that package make them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a3tune.metrics.folders import required, run_script
from a3tune.metrics.text import Scores, Texts

Annotation = Mapping[str, Any]
_HOW = (
    "make an environment FOLDER/venv with `pip install radgraph==0.1.18 'transformers<5'`; where there is a network, "
    "unpack radgraph.tar.gz of StanfordAIMI/RRG_scorers into FOLDER/radgraph, run `hf download NAME --local-dir "
    "FOLDER/NAME` for the encoder NAME (`model_name` in FOLDER/radgraph/config.json), then give FOLDER as radgraph"
)


def radgraph(predictions: Texts, references: Texts, folder: Path | None = None) -> Scores:
    """`radgraph`, and the package's `radgraph_simple`, `radgraph_partial`, `radgraph_complete`, each in [0, 1].

    Args:
        folder: `radgraph/` with RadGraph-1.0, the encoder under its own name, and `venv/` if the package is there.

    Raises:
        ModelError: the folder does not hold that, or the package failed.
    """
    folder = required(folder, ["radgraph/config.json", "radgraph/weights.th"], _HOW)
    annotated = run_script("annotate_radgraph", folder, [[*predictions, *references]], _HOW)
    pairs = list(zip(annotated[: len(predictions)], annotated[len(predictions) :], strict=True))
    levels = [package_f1(said, truth) for said, truth in pairs]
    return {"radgraph": [combined_f1(said, truth) for said, truth in pairs]} | {
        f"radgraph_{name}": [level[name] for level in levels] for name in ("simple", "partial", "complete")
    }


def combined_f1(said: Annotation, truth: Annotation) -> float:
    """Mean of the F1 of entities (words, label) and the F1 of relations (entity, entity, type); an F1 of nothing is 0.

    So a report without relations reaches 0.5 at most, as published.
    """
    return (_f1(*map(_entities, (said, truth))) + _f1(*map(_relations, (said, truth)))) / 2


def package_f1(said: Annotation, truth: Annotation) -> dict[str, float]:
    """The package's F1 of entities: `simple` words and label; `partial` also whether it has relations; `complete` also
    which ones, with the words of the other."""
    return {
        "simple": _f1(_entities(said), _entities(truth)),
        "partial": _f1(_with_existence(said), _with_existence(truth)),
        "complete": _f1(_with_relations(said), _with_relations(truth)),
    }


def _entities(annotation: Annotation) -> set[tuple[Any, ...]]:
    return {_entity(entity) for entity in annotation["entities"].values()}


def _relations(annotation: Annotation) -> set[tuple[Any, ...]]:
    entities = annotation["entities"]
    return {
        (_entity(entity), _entity(entities[other]), kind)
        for entity in entities.values()
        for kind, other in entity["relations"]
    }


def _with_existence(annotation: Annotation) -> set[tuple[Any, ...]]:
    return {(*_entity(entity), bool(entity["relations"])) for entity in annotation["entities"].values()}


def _with_relations(annotation: Annotation) -> set[tuple[Any, ...]]:
    """The package lower-cases the words of entities that have relations, and only those."""
    entities = annotation["entities"]
    alone = {_entity(entity) for entity in entities.values() if not entity["relations"]}
    related = {
        (entity["tokens"].lower(), entity["label"], kind, entities[other]["tokens"].lower())
        for entity in entities.values()
        for kind, other in entity["relations"]
    }
    return alone | related


def _entity(entity: Mapping[str, Any]) -> tuple[str, str]:
    return entity["tokens"], entity["label"]


def _f1(said: set[Any], truth: set[Any]) -> float:
    common = len(said & truth)
    return 2 * common / (len(said) + len(truth)) if common else 0.0
