"""Tables of the phantom's anatomy: which organs a view shows, where, how bright, and which kinds of lesion exist.

Coordinates are fractions of half the image side, origin at the centre, x to the right, y down. Left and right are the
patient's, drawn in radiological convention: the patient's left is on the right of the picture.
"""

from dataclasses import dataclass

MODALITIES = ("CT", "MRI")
LESION_KINDS = ("cyst", "mass", "calcification", "abscess")


@dataclass(frozen=True, slots=True)
class Organ:
    """An ellipse before deformation, with its mean brightness (0..1) in each modality."""

    name: str
    x: float
    y: float
    rx: float
    ry: float
    ct: float
    mri: float
    angle: float = 0.0
    texture: float = 0.03
    """Amplitude of the organ's own grain."""
    hosts_lesions: bool = True


@dataclass(frozen=True, slots=True)
class View:
    """One body part in one plane: the body's outline, then organs in painting order."""

    body: str
    plane: str
    outline: tuple[float, float]
    """Half axes of the body."""
    tissue_ct: float
    tissue_mri: float
    organs: tuple[Organ, ...]


VIEWS = (
    View(
        "chest",
        "axial",
        (0.92, 0.74),
        0.42,
        0.50,
        (
            Organ("right lung", -0.46, -0.03, 0.33, 0.50, 0.10, 0.14, 8, 0.05),
            Organ("left lung", 0.46, -0.03, 0.33, 0.50, 0.10, 0.14, -8, 0.05),
            Organ("heart", 0.08, -0.26, 0.27, 0.26, 0.58, 0.36, 20),
            Organ("spine", 0.0, 0.52, 0.14, 0.14, 0.88, 0.68, hosts_lesions=False),
        ),
    ),
    View(
        "chest",
        "coronal",
        (0.86, 0.95),
        0.42,
        0.50,
        (
            Organ("right lung", -0.42, -0.10, 0.30, 0.62, 0.10, 0.14, 4, 0.05),
            Organ("left lung", 0.42, -0.10, 0.29, 0.60, 0.10, 0.14, -4, 0.05),
            Organ("heart", 0.10, 0.18, 0.28, 0.30, 0.58, 0.36, 30),
            Organ("trachea", 0.0, -0.62, 0.06, 0.28, 0.04, 0.06, hosts_lesions=False),
        ),
    ),
    View(
        "abdomen",
        "axial",
        (0.94, 0.76),
        0.36,
        0.62,
        (
            Organ("liver", -0.40, -0.14, 0.42, 0.42, 0.56, 0.44, -15),
            Organ("stomach", 0.28, -0.36, 0.28, 0.22, 0.24, 0.28, 15, 0.06),
            Organ("spleen", 0.66, 0.06, 0.18, 0.29, 0.66, 0.34, -12),
            Organ("left kidney", 0.36, 0.40, 0.20, 0.22, 0.74, 0.80, 20),
            Organ("right kidney", -0.36, 0.42, 0.20, 0.22, 0.74, 0.80, -20),
            Organ("spine", 0.0, 0.50, 0.14, 0.15, 0.90, 0.24, hosts_lesions=False),
        ),
    ),
    View(
        "abdomen",
        "coronal",
        (0.84, 0.96),
        0.36,
        0.62,
        (
            Organ("liver", -0.38, -0.48, 0.40, 0.31, 0.56, 0.44, 12),
            Organ("spleen", 0.60, -0.46, 0.18, 0.27, 0.66, 0.34, 10),
            Organ("stomach", 0.18, -0.36, 0.24, 0.24, 0.24, 0.28, -20, 0.06),
            Organ("left kidney", 0.38, 0.10, 0.18, 0.27, 0.74, 0.80, -10),
            Organ("right kidney", -0.38, 0.14, 0.18, 0.27, 0.74, 0.80, 10),
            Organ("bladder", 0.0, 0.70, 0.27, 0.19, 0.48, 0.92, 0, 0.01),
        ),
    ),
    View(
        "brain",
        "axial",
        (0.76, 0.92),
        0.90,
        0.30,
        (
            Organ("frontal lobe", 0.0, -0.50, 0.52, 0.33, 0.50, 0.52),
            Organ("occipital lobe", 0.0, 0.54, 0.50, 0.31, 0.56, 0.60),
            Organ("left temporal lobe", 0.41, 0.02, 0.27, 0.36, 0.44, 0.44, 6),
            Organ("right temporal lobe", -0.41, 0.02, 0.27, 0.36, 0.44, 0.44, -6),
            Organ("ventricles", 0.0, 0.0, 0.13, 0.27, 0.16, 0.12, 0, 0.01, False),
        ),
    ),
    View(
        "brain",
        "coronal",
        (0.80, 0.86),
        0.90,
        0.30,
        (
            Organ("parietal lobe", 0.0, -0.46, 0.55, 0.31, 0.52, 0.56),
            Organ("left temporal lobe", 0.44, 0.12, 0.28, 0.34, 0.44, 0.44, 10),
            Organ("right temporal lobe", -0.44, 0.12, 0.28, 0.34, 0.44, 0.44, -10),
            Organ("cerebellum", 0.0, 0.56, 0.42, 0.24, 0.60, 0.36, 0, 0.08),
            Organ("ventricles", 0.0, -0.02, 0.15, 0.20, 0.16, 0.12, 0, 0.01, False),
        ),
    ),
)
ORGANS = tuple(sorted({organ.name for view in VIEWS for organ in view.organs}))
