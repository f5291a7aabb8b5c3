import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from a3tune.data.annotations import attach_regions
from a3tune.data.annotations.label_studio import decode_brush
from a3tune.errors import DataError
from a3tune.masks import decode_mask, encode_mask, region_mask
from a3tune.types import Region, Sample
from orientations import UPRIGHT, oriented

ORGANS = Path(os.environ.get("A3TUNE_DATA", Path(__file__).parents[2] / "shared" / "data")) / "organs"
H, W = 20, 30
LIVER = np.zeros((H, W), dtype=bool)
LIVER[4:12, 5:15] = True
SPLEEN = np.zeros((H, W), dtype=bool)
SPLEEN[2:6, 20:29] = True


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("L", (W, H)).save(tmp_path / "images" / f"{name}.png")
    prompts = {"1": "Where is the liver?", "2": "Is the spleen larger than the liver?", "3": "What is shown?"}
    rows = [Sample(key, tmp_path / "images" / "a.png", prompt, "x", "open") for key, prompt in prompts.items()]
    return [*rows, Sample("4", tmp_path / "images" / "b.png", "Where is the liver?", "x", "open", ())]


def written(tmp_path: Path, data: object, name: str = "masks.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(data))
    return path


def coco(*annotations: dict, file: str = "a.png", size: tuple[int, int] = (H, W)) -> dict:
    return {
        "images": [{"id": 1, "file_name": file, "height": size[0], "width": size[1]}],
        "categories": [{"id": 1, "name": "liver"}, {"id": 2, "name": "spleen"}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 1} | item for n, item in enumerate(annotations)],
    }


def masks_of(sample: Sample) -> dict[str, np.ndarray]:
    assert sample.regions is not None
    return {region.name: region_mask(region, H, W) for region in sample.regions}


def uncompressed(mask: np.ndarray) -> list[int]:
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff([0, *edges.tolist(), flat.size]).tolist()


def test_coco_in_all_its_shapes(tmp_path, samples):
    shapes = (
        {"segmentation": {"size": [H, W], "counts": encode_mask(LIVER).counts}},
        {"segmentation": {"size": [H, W], "counts": uncompressed(LIVER)}},
        {"segmentation": [[5, 4, 15, 4, 15, 12, 5, 12]]},
        {"segmentation": [[5, 4, 10, 4, 10, 12, 5, 12], [10, 4, 15, 4, 15, 12, 10, 12]]},
        {"bbox": [5, 4, 10, 8]},
        {"bbox": [5, 4, 10, 8], "segmentation": []},
    )
    for shape in shapes:
        new = attach_regions(samples, written(tmp_path, coco(shape)))
        assert np.array_equal(masks_of(new[0])["liver"], LIVER)
        assert new[2:] == samples[2:]


def test_a_sample_gets_the_regions_that_its_prompt_names(tmp_path, samples):
    box = {"bbox": [20, 2, 9, 4], "category_id": 2}
    new = attach_regions(samples, written(tmp_path, coco({"bbox": [5, 4, 10, 8]}, box)))
    assert [sorted(masks_of(sample)) for sample in new[:2]] == [["liver"], ["liver", "spleen"]]
    assert np.array_equal(masks_of(new[1])["spleen"], SPLEEN)
    assert [sample.regions for sample in new[2:]] == [None, ()]


def test_boxes_and_polygons_end_at_the_image(tmp_path, samples):
    for shape in ({"bbox": [-5, -5, 15, 15]}, {"segmentation": [[-5, -5, 10, -5, 10, 10, -5, 1e12]]}):
        mask = masks_of(attach_regions(samples, written(tmp_path, coco(shape)))[0])["liver"]
        assert mask[:9, :9].any()
        assert not mask[:, 11:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": {"size": [H, W], "counts": "zz"}}, "annotations[0]: segmentation: RLE"),
        ({"segmentation": {"size": [W, H], "counts": "0"}}, "segmentation.size: expected [20, 30]"),
        ({"segmentation": {"size": [H, W], "counts": [1, 2]}}, "runs that sum to 600"),
        ({"segmentation": {"size": [H, W], "counts": [601, -1]}}, "runs that sum to 600"),
        ({"segmentation": {"size": [H, W], "counts": None}}, "segmentation.counts: expected a list"),
        ({"segmentation": [[1, 2, 3, 4]]}, "at least three corners, got 2"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "odd count"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "finite numbers"),
        ({"segmentation": [[1, 1, 1, 1, 1, 1]]}, "cover no pixel"),
        ({"segmentation": {"size": [H, W], "counts": [H * W]}}, "a mask of something, it covers no pixel"),
        ({"segmentation": [], "bbox": [10, 5, 0, 0]}, "bbox: expected a box inside the image"),
        ({"bbox": [1, 2, 3]}, "bbox: expected a list of 4"),
        ({"bbox": [100, 2, 3, 4]}, "bbox: expected a box inside the image"),
        ({"bbox": [1, 2, 3, 4], "image_id": 9}, "expected an image and a category of this file"),
        ({"bbox": [1, 2, 3, 4], "category_id": None}, "category_id: expected"),
    ],
)
def test_damaged_coco(tmp_path, samples, change, message):
    with pytest.raises(DataError, match=r"(?s)masks\.json: no sample gets a region.*left out: .*" + re.escape(message)):
        attach_regions(samples, written(tmp_path, coco(change)))
    said: list[str] = []
    good = {"bbox": [5, 4, 10, 8]}
    new = attach_regions(samples, written(tmp_path, coco(good, {"bbox": [1, 2, 3, 4]} | change)), say=said.append)
    assert np.array_equal(masks_of(new[0])["liver"], LIVER)
    assert len(said) == 1 and message.replace("annotations[0]", "annotations[1]") in said[0]


def test_images_that_annotations_name(tmp_path, samples):
    box = {"bbox": [1, 2, 3, 4]}
    with pytest.raises(
        DataError, match=r"(?s)no sample gets.*neither in the samples nor beside their images: 'c\.png'"
    ):
        attach_regions(samples, written(tmp_path, coco(box, file="c.png")))
    with pytest.raises(DataError, match=r"leads out of it"):
        attach_regions(samples, written(tmp_path, coco(box, file="../images/a.png")))
    with pytest.raises(DataError, match=r"expected a mask of 30 x 20 pixels as .*, got 31 x 20"):
        attach_regions(samples, written(tmp_path, coco(box, size=(H, W + 1))))
    assert attach_regions(samples, written(tmp_path, coco(box, file="images/a.png")))[0].regions
    for name in ("/data/project/images/a.png", "/data/a.png", "/a.png"):
        assert attach_regions(samples, written(tmp_path, coco(box, file=name)))[0].regions
    both = [samples[0], Sample("9", tmp_path / "other" / "a.png", "liver", "x", "open")]
    with pytest.raises(DataError, match="fits several images"):
        attach_regions(both, written(tmp_path, coco(box)))
    data = coco(box) | {"images": [*coco()["images"], {"id": 2, "file_name": "b.png", "height": H, "width": W}]}
    data["annotations"].append({"image_id": 2, "category_id": 1, "bbox": [1, 1, 2, 2]})
    assert attach_regions(samples[:1], written(tmp_path, data))[0].regions  # b.png is there, no sample shows it


def test_masks_that_no_prompt_names(tmp_path, samples):
    with pytest.raises(DataError, match="no prompt names any of liver"):
        attach_regions(samples[2:3], written(tmp_path, coco({"bbox": [1, 2, 3, 4]})))


@pytest.mark.parametrize(
    "text", ["{}", "[]", "7", "no json", '{"images": 1, "annotations": 2, "categories": 3}', "[7]"]
)
def test_formats_that_nobody_knows(tmp_path, samples, text):
    (tmp_path / "masks.json").write_text(text)
    with pytest.raises(DataError, match=r"masks\.json: .*expected"):
        attach_regions(samples, tmp_path / "masks.json")
    with pytest.raises(DataError, match=r"none\.json: expected masks"):
        attach_regions(samples, tmp_path / "none.json")


def test_png_masks(tmp_path, samples):
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "labels.json").write_text('{"1": "liver", "7": "spleen", "9": "colon"}')
    values = (LIVER + 7 * SPLEEN).astype(np.uint8)
    grey = Image.fromarray(values)
    palette = Image.fromarray(values, "L").convert("P")
    palette = Image.fromarray(values)
    palette.putpalette([9, 99, 199] * 8)
    for image in (grey, palette, grey.convert("RGB"), Image.fromarray(values.astype(np.uint16))):
        image.save(folder / "a.png")
        new = attach_regions(samples, folder)
        assert np.array_equal(masks_of(new[1])["liver"], LIVER)
        assert np.array_equal(masks_of(new[1])["spleen"], SPLEEN)
        assert new[3] == samples[3]


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["grey", "palette", "16 bits", "one bit", "RGB"])
def test_a_png_mask_is_turned_upright_by_its_own_orientation(tmp_path, samples, kind: str, orientation: int):
    folder = tmp_path / "masks"
    folder.mkdir()
    back = {6: 8, 8: 6}.get(orientation, orientation)  # all others undo themselves
    stored = np.ascontiguousarray(UPRIGHT[back](LIVER))
    mask = Image.fromarray(stored.astype(np.uint16) if kind == "16 bits" else stored.astype(np.uint8))
    if kind == "palette":
        mask.putpalette([9, 99, 199] * 8)
    mask = {"one bit": Image.fromarray(stored), "RGB": mask.convert("RGB")}.get(kind, mask)
    mask.save(folder / "a.png", exif=oriented(orientation))
    new = attach_regions(samples, folder)
    assert np.array_equal(decode_mask(new[0].regions[0].mask), LIVER)


def test_a_png_mask_of_one_value_needs_no_name(tmp_path, samples):
    folder = tmp_path / "masks"
    folder.mkdir()
    Image.fromarray(LIVER * np.uint8(255)).save(folder / "a.png")
    new = attach_regions(samples, folder)
    assert [sample.regions for sample in new[:3]] == [(Region(mask=encode_mask(LIVER)),)] * 3


def test_png_masks_that_do_not_fit(tmp_path, samples):
    folder = tmp_path / "masks"
    folder.mkdir()
    with pytest.raises(DataError, match="found none"):
        attach_regions(samples, folder)
    Image.new("L", (W, H + 1), 1).save(folder / "a.png")
    with pytest.raises(DataError, match=r"a\.png: expected a mask of 30 x 20 .* got 30 x 21"):
        attach_regions(samples, folder)
    Image.fromarray((LIVER + 7 * SPLEEN).astype(np.uint8)).save(folder / "a.png")
    with pytest.raises(DataError, match=r'values 1, 7 have no name; write \{"1": "\.\.\."'):
        attach_regions(samples, folder)
    (folder / "labels.json").write_text('{"1": "liver"}')
    new, said = said_of(samples, folder)
    assert [region.name for region in new[1].regions] == ["liver"] and "values 7 have no name" in said[0]
    (folder / "labels.json").write_text("[]")
    with pytest.raises(DataError, match=r"labels\.json: expected an object"):
        attach_regions(samples, folder)
    (folder / "labels.json").unlink()
    Image.new("RGB", (W, H), (1, 2, 3)).save(folder / "a.png")
    with pytest.raises(DataError, match="colour picture"):
        attach_regions(samples, folder)
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"a\.png: expected a mask image"):
        attach_regions(samples, folder)
    (folder / "a.png").rename(folder / "zzz.png")
    with pytest.raises(DataError, match=r"zzz\.png: names an image that is neither in the samples nor beside"):
        attach_regions(samples, folder)


def brush_code(mask: np.ndarray, sizes: tuple[int, int, int, int] = (3, 4, 8, 16)) -> list[int]:
    """Label Studio's code of a mask as RGBA bytes: runs as runs, single bytes as literals."""
    values = np.repeat((mask.ravel() * 255).astype(int), 4)
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        while start < end:
            count = min(int(end - start), 2 ** sizes[-1])
            kind = next(index for index, size in enumerate(sizes) if count <= 2**size)
            length = f"{kind:02b}" + format(count - 1, f"0{sizes[kind]}b")
            words = f"{values[start]:08b}"
            bits += ("1" + length + words) if count > 4 else ("0" + length + words * count)
            start += count
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


@settings(deadline=None, max_examples=60)
@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=15)))
def test_brush_strokes_are_decoded(mask):
    assert np.array_equal(decode_brush(brush_code(mask), *mask.shape), mask)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 255), max_size=60))
def test_any_brush_code_is_a_mask_or_a_data_error(codes):
    try:
        assert decode_brush([0, 0, 0, 48, *codes], 3, 4).shape == (3, 4)
    except DataError as error:
        assert "expected" in str(error)


def task(*results: dict, image: str = "/data/upload/3/0a1b2c3d-a.png", **more) -> dict:
    size = {"original_width": W, "original_height": H}
    return {"data": {"image": image}, "annotations": [{"result": [size | result for result in results]}]} | more


def test_label_studio_shapes(tmp_path, samples):
    def shape(kind: str, **value) -> dict:
        return {"type": kind, "value": value | {kind: ["Liver"]}}

    shapes = (
        shape("brushlabels", format="rle", rle=brush_code(LIVER)),
        shape("rectanglelabels", x=500 / W, y=400 / H, width=1000 / W, height=800 / H, rotation=0),
        # The same rectangle, drawn from its upper right corner and turned by a quarter, clockwise.
        shape("rectanglelabels", x=1500 / W, y=400 / H, width=800 / W, height=1000 / H, rotation=90),
        shape(
            "polygonlabels", points=[[500 / W, 400 / H], [1500 / W, 400 / H], [1500 / W, 1200 / H], [500 / W, 1200 / H]]
        ),
    )
    for item in shapes:
        new = attach_regions(samples, written(tmp_path, [task({"type": "choices", "value": {}}, item)]))
        assert np.array_equal(masks_of(new[0])["Liver"], LIVER), item
    unnamed = {"type": "brush", "value": {"rle": brush_code(LIVER)}}
    assert all(sample.regions for sample in attach_regions(samples, written(tmp_path, [task(unnamed)]))[:3])


def test_how_label_studio_names_images(tmp_path, samples):
    box = {"type": "rectanglelabels", "value": {"x": 0, "y": 0, "width": 9, "height": 9, "rectanglelabels": ["liver"]}}
    tasks = (
        task(box),
        task(box, image="s3://bucket/x/a.png"),
        task(box, image="http://host/x/a.png?token=1"),
        task(box, image="/data/local-files/?d=images/a.png"),
        task(box, image="nothing", file_upload="0a1b2c3d-a.png"),
        task(box) | {"data": {"picture": "a.png"}},
    )
    for item in tasks:
        assert attach_regions(samples, written(tmp_path, [item]))[0].regions, item
    cancelled = task(box)
    cancelled["annotations"].insert(0, {"was_cancelled": True, "result": []})
    assert attach_regions(samples, written(tmp_path, [cancelled, task(), {"data": {"image": "b.png"}}]))[0].regions
    with pytest.raises(DataError, match="leads out of it"):
        attach_regions(samples, written(tmp_path, [task(box, image="/data/local-files/?d=../a.png")]))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"type": "ellipselabels", "value": {"x": 1}}, "expected a list of 4 finite numbers"),
        ({"type": "rectanglelabels", "value": {"x": 1, "y": 1, "width": 0, "height": 5}}, "some width and height"),
        (
            {"type": "ellipse", "value": {"x": 1, "y": 1, "radiusX": 3, "radiusY": 0}},
            "ellipse of some width and height, got the radii 0.9 and 0",
        ),
        ({"type": "brush", "value": {"rle": brush_code(LIVER & SPLEEN)}}, "rle: expected a mask of something"),
        ({"type": "brush", "value": {"rle": brush_code(LIVER)}, "image_rotation": 90}, "turn it back"),
        ({"type": "keypointlabels", "value": {}}, "1 results of the type 'keypointlabels', which are no regions"),
        ({"type": "brushlabels", "value": {"rle": [300]}}, "rle: expected a list of bytes"),
        ({"type": "brushlabels", "value": {"rle": [0, 0, 9, 96]}}, "rle: expected a complete brush code"),
        (
            {"type": "brushlabels", "value": {"rle": brush_code(LIVER[:5])}},
            "brush code of 30 x 20 pixels, got one of 150",
        ),
        ({"type": "rectanglelabels", "value": {"x": 1}}, "expected a list of 4 finite numbers"),
        ({"type": "polygonlabels", "value": {"points": [[1, 2], [3]]}}, "points: expected a list of 2"),
        ({"type": "polygonlabels", "value": {"points": []}}, "at least three corners"),
        ({"type": "brushlabels", "value": {}, "original_width": "30"}, "height and width in pixels"),
        ({"type": "brushlabels", "value": {}, "original_width": 10**9}, "at most 80,000,000 pixels"),
    ],
)
def test_damaged_label_studio_exports(tmp_path, samples, result, message):
    with pytest.raises(DataError, match=re.escape(message)):
        attach_regions(samples, written(tmp_path, [task(result)]))


def volumes(tmp_path: Path, labels: np.ndarray, affine: np.ndarray) -> list[Sample]:
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(
        nibabel.Nifti1Image(np.arange(labels.size, dtype=np.int16).reshape(labels.shape), affine),
        tmp_path / "ct.nii.gz",
    )
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "labels.nii.gz")
    (tmp_path / "labels.json").write_text('{"1": "liver", "2": "spleen"}')
    path = tmp_path / "ct.nii.gz"
    return [
        Sample(f"{n}", Path(f"{path}#axial={n}"), "Is the liver normal?", "yes", "closed")
        for n in range(labels.shape[2])
    ]


def test_label_volumes(tmp_path):
    labels = np.zeros((4, 5, 3), np.uint8)
    labels[0, 4, 1], labels[:, :, 2] = 1, 2
    slices = volumes(tmp_path, labels, np.diag([2.0, 2, 2, 1]))
    new = attach_regions(slices, tmp_path / "labels.nii.gz")
    assert [bool(sample.regions) for sample in new] == [False, True, False]
    mask = decode_mask(new[1].regions[0].mask)
    assert mask.shape == (5, 4)
    assert np.argwhere(mask).tolist() == [[0, 3]]  # anterior is at the top, the patient's left on the right
    folder = tmp_path / "labels"
    folder.mkdir()
    (tmp_path / "labels.nii.gz").rename(folder / "ct.nii.gz")
    (tmp_path / "labels.json").rename(folder / "labels.json")
    assert attach_regions(slices, folder) == new
    (folder / "ct.nii.gz").rename(folder / "mr.nii.gz")
    with pytest.raises(DataError, match="no sample shows a slice"):
        attach_regions(slices, folder)


def test_label_volumes_on_another_grid(tmp_path):
    labels = np.ones((4, 5, 3), np.uint8)
    slices = volumes(tmp_path, labels, np.eye(4))
    nibabel = pytest.importorskip("nibabel")
    for other, affine in ((labels[:3], np.eye(4)), (labels, np.diag([1.0, 1, 2, 1]))):
        nibabel.save(nibabel.Nifti1Image(other, affine), tmp_path / "labels.nii.gz")
        with pytest.raises(DataError, match=r"labels\.nii\.gz: expected labels on the grid of .*ct\.nii\.gz"):
            attach_regions(slices, tmp_path / "labels.nii.gz")


@pytest.mark.skipif(not ORGANS.is_dir(), reason="needs the CT of shared/data/organs (A3TUNE_DATA)")
def test_organs_of_a_real_ct():
    pytest.importorskip("nibabel")
    seen = []
    prompts = ("Is the liver normal?", "Where is the left kidney?", "What modality is this?")
    slices = [
        Sample(f"{index}-{n}", ORGANS / f"ct.nii.gz#axial={index}", prompt, "x", "open")
        for index in (10, 20)
        for n, prompt in enumerate(prompts)
    ]
    new = attach_regions(slices, ORGANS / "ct_labels.nii.gz", progress=lambda *counts: seen.append(counts))
    assert [[region.name for region in sample.regions or ()] for sample in new[:3]] == [["liver"], ["kidney_left"], []]
    assert seen == [(1, 2), (2, 2)]


def said_of(samples: list[Sample], source: Path) -> tuple[list[Sample], list[str]]:
    said: list[str] = []
    return attach_regions(samples, source, say=said.append), said


def test_what_is_no_region_in_label_studio_is_counted(tmp_path, samples):
    box = {"type": "rectanglelabels", "value": {"x": 0, "y": 0, "width": 9, "height": 9, "rectanglelabels": ["liver"]}}
    relation = {"type": "relation", "from_id": "a", "to_id": "b", "direction": "right"}
    point = {"type": "keypointlabels", "value": {"x": 1, "y": 1, "width": 0.5, "keypointlabels": ["liver"]}}
    damaged = {"type": "polygonlabels", "value": {"points": 7}}
    new, said = said_of(samples, written(tmp_path, [task(relation, damaged, point, box), task(relation)]))
    assert len(new[0].regions) == 1
    assert [line.partition("masks.json: ")[2] for line in said] == [
        "[0]: result[1]: points: expected a list of [x, y] in percent, got 7",
        "2 results of the type 'relation', which are no regions",
        "1 results of the type 'keypointlabels', which are no regions",
    ]


@pytest.mark.parametrize("turn", [0, 30, 90])
def test_ellipses_of_label_studio(tmp_path, samples, turn):
    value = {"x": 50, "y": 50, "radiusX": 600 / W, "radiusY": 300 / H, "rotation": turn, "ellipselabels": ["liver"]}
    new = attach_regions(samples, written(tmp_path, [task({"type": "ellipselabels", "value": value})]))
    y, x = np.mgrid[:H, :W] + 0.5
    right, down = x - W / 2, y - H / 2
    along = right * np.cos(np.deg2rad(turn)) + down * np.sin(np.deg2rad(turn))
    across = down * np.cos(np.deg2rad(turn)) - right * np.sin(np.deg2rad(turn))
    truth = (along / 6) ** 2 + (across / 3) ** 2 <= 1
    mask = masks_of(new[0])["liver"]
    assert (mask & truth).sum() / (mask | truth).sum() > 0.85
    assert (along[mask].std() > 1.5 * across[mask].std()) and abs(mask.sum() / truth.sum() - 1) < 0.15


def test_a_shape_of_label_studio_may_have_its_name_in_another_result(tmp_path, samples):
    shape = {"type": "rectangle", "id": "q", "value": {"x": 0, "y": 0, "width": 9, "height": 9}}
    name = {"type": "labels", "id": "q", "value": {"labels": ["spleen"]}}
    new = attach_regions(samples, written(tmp_path, [task(shape, name)]))
    assert [region.name for region in new[1].regions] == ["spleen"]
    assert new[0].regions is None


def test_of_absolute_names_the_one_that_fits_best_counts(tmp_path):
    rows = []
    for patient in ("p1", "p2"):
        (tmp_path / patient).mkdir()
        Image.new("L", (W, H)).save(tmp_path / patient / "1.png")
        rows.append(Sample(patient, tmp_path / patient / "1.png", "liver", "x", "open"))
    data = coco({"bbox": [1, 1, 3, 4]}, {"bbox": [5, 4, 10, 8], "image_id": 2})
    data["images"] = [data["images"][0] | {"id": n, "file_name": f"/data/p{n}/1.png"} for n in (1, 2)]
    new, said = said_of(rows, written(tmp_path, data))
    assert [len(row.regions) for row in new] == [1, 1] and said == []
    new, said = said_of(rows[1:], written(tmp_path, data))  # p1/1.png ends in "1.png", too
    assert np.array_equal(masks_of(new[0])["liver"], LIVER)
    assert len(said) == 1 and "'/data/p1/1.png': another name fits" in said[0]
    with pytest.raises(DataError, match=r"(?s)nor beside their images: '/data/1\.png'"):
        attach_regions(rows, written(tmp_path, coco({"bbox": [1, 1, 3, 4]}, file="/data/1.png")))


def test_a_part_of_a_polygon_that_is_none_is_left_out(tmp_path, samples):
    new, said = said_of(
        samples, written(tmp_path, coco({"segmentation": [[5, 4, 15, 4, 15, 12, 5, 12], [1, 1, 2, 2]]}))
    )
    assert np.array_equal(masks_of(new[0])["liver"], LIVER)
    assert len(said) == 1 and "at least three corners, got 2" in said[0]


def test_results_of_coco_alone(tmp_path, samples):
    with pytest.raises(DataError, match="these are COCO results, which name images and categories by number only"):
        attach_regions(
            samples, written(tmp_path, [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}])
        )


def test_the_soft_edge_of_a_png_mask_ends_at_half(tmp_path, samples):
    folder = tmp_path / "masks"
    folder.mkdir()
    soft = LIVER * 255.0
    soft[3, 5:15], soft[12, 5:15] = np.linspace(1, 120, 10), np.linspace(128, 250, 10)
    Image.fromarray(soft.astype(np.uint8)).save(folder / "a.png")
    truth = LIVER.copy()
    truth[12, 5:15] = True
    for names in ({}, {"255": "liver"}):
        (folder / "labels.json").write_text(json.dumps(names))
        new, said = said_of(samples, folder)
        (region,) = new[0].regions
        assert np.array_equal(region_mask(region, H, W), truth)
        assert len(said) == 1 and "21 grey values, taken for one mask with a soft edge that ends at 127" in said[0]


def test_many_structures_are_no_soft_edge(tmp_path, samples):
    folder = tmp_path / "masks"
    folder.mkdir()
    labels = np.arange(H * W).reshape(H, W) % 250 + 1
    labels[0, 0] = 255
    Image.fromarray(labels.astype(np.uint8)).save(folder / "a.png")
    with pytest.raises(DataError, match=r"the values 1, 2, 3, .* have no name; write"):
        attach_regions(samples, folder)
    (folder / "labels.json").write_text('{"7": "liver"}')
    new, said = said_of(samples, folder)
    assert np.array_equal(masks_of(new[0])["liver"], labels == 7)
    assert len(said) == 1 and "have no name" in said[0]


def test_one_bad_png_mask_leaves_the_others(tmp_path, samples):
    folder = tmp_path / "masks"
    folder.mkdir()
    Image.fromarray(LIVER * np.uint8(255)).save(folder / "a.png")
    Image.new("L", (W, H)).save(folder / "b.png")
    (folder / "c.png").write_bytes(b"no mask")
    new, said = said_of(samples, folder)
    assert [bool(sample.regions) for sample in new] == [True, True, True, False]
    assert [line.partition("masks/")[2] for line in said] == [
        "b.png: an empty mask, all of it is background",
        "c.png: names an image that is neither in the samples nor beside their images",
    ]
