import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3tune.data.mention import mentioned

NAMES = [
    "Liver",
    "Left Lung",
    "Right Lung",
    "Lung Cancer",
    "kidney_left",
    "kidney_right",
    "Femoral Head",
    "Spinal Cord",
]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Does the picture contain liver?", ["Liver"]),
        ("Is the lung healthy?", ["Left Lung", "Right Lung"]),
        ("What color does the left lung show?", ["Left Lung"]),
        ("Which side of lung is abnormal,left or right?", ["Left Lung", "Right Lung"]),
        ("Where is the lung cancer?", ["Lung Cancer"]),
        ("Where in the lung is the lung cancer?", ["Left Lung", "Right Lung", "Lung Cancer"]),
        ("How many KIDNEYS?", ["kidney_left", "kidney_right"]),
        ("Is the right kidney larger than the liver", ["Liver", "kidney_right"]),
        ("the two femoral heads", ["Femoral Head"]),
        ("Is this organ to the left of the spinal cord?", ["Spinal Cord"]),
        ("What modality is used?", []),
        ("Is the liverwurst fresh?", []),
        ("", []),
    ],
)
def test_what_a_question_names(text, names):
    assert mentioned(text, NAMES) == names


@given(st.text(max_size=60), st.lists(st.text(max_size=12), max_size=5))
def test_any_texts(text, names):
    assert set(mentioned(text, names)) <= set(names)


@given(st.lists(st.sampled_from(["liver", "upper lobe", "colon", "left eye"]), unique=True))
def test_every_name_written_out_is_found(names):
    assert mentioned("Compare " + " with ".join(names), names) == names
