"""Predictor and Detections: every kind of image in, evaluation's own preprocessing, pixels of the original out."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ddetr.checkpoint import build_from_checkpoint, load_checkpoint
from ddetr.datasets.annotations import Annotations, Category, ImageRecord
from ddetr.datasets.collate import collate
from ddetr.datasets.dataset import DetectionDataset
from ddetr.datasets.transforms import official_eval
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator, evaluate
from ddetr.inference.detections import Detections
from ddetr.inference.predictor import BadImage, Predictor

CATEGORIES = (Category(3, "cat"), Category(17, "dog"), Category(90, "owl"))
QUERIES = [(0.5, 0.5, 0.5, 0.5), (0.25, 0.25, 0.2, 0.4), (0.8, 0.6, 0.3, 0.2)]


class StubModel(nn.Module):
    """Finds the same three relative boxes in each image, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, images, mask):
        assert not self.training
        self.seen.append((images, mask))
        logits = torch.tensor([[2.0, -9, -9], [-9, 0.5, -9], [-9, -9, -1]])
        boxes = torch.tensor(QUERIES)
        return {"pred_logits": logits.repeat(len(images), 1, 1), "pred_boxes": boxes.repeat(len(images), 1, 1)}


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(StubModel(), CATEGORIES, image_size=40, max_size=64, threshold=0.5, device="cpu")


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def test_boxes_are_in_pixels_of_the_original(predictor, pixels):
    found = predictor.predict(pixels)
    assert isinstance(found, Detections)
    assert found.size_hw == (60, 90)
    assert found.names == ["cat", "dog"]
    assert found.labels.tolist() == [0, 1]
    assert found.category_ids.tolist() == [3, 17]
    assert found.scores.tolist() == pytest.approx([0.8808, 0.6225], abs=1e-4)
    assert found.boxes_xyxy[0].tolist() == pytest.approx([22.5, 15, 67.5, 45])


def test_all_kinds_of_images_are_the_same_image(predictor, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, tensor, tensor / 255]
    found = predictor.predict(kinds)
    assert [one.path for one in found] == [tmp_path / "a.png"] * 2 + [None] * 4
    for images, mask in predictor.model.seen:
        assert torch.equal(images, predictor.model.seen[0][0])
        assert images.shape == (1, 3, 40, 60)
        assert mask is None  # nothing is padded


def test_grey_images(predictor, pixels):
    grey = pixels[:, :, 0]
    predictor.predict([grey, grey[:, :, None], torch.from_numpy(grey)[None], Image.fromarray(grey)])
    predictor.predict(np.repeat(grey[:, :, None], 3, axis=2))
    for images, _ in predictor.model.seen:
        assert torch.equal(images, predictor.model.seen[-1][0])


def test_exif_rotation_is_applied(predictor, tmp_path):
    image = Image.new("RGB", (90, 60))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    found = predictor.predict(tmp_path / "turned.jpg")
    assert found.size_hw == (90, 60)
    assert found.boxes_xyxy[0].tolist() == pytest.approx([15, 22.5, 45, 67.5])
    assert found.draw().size == (60, 90)


def test_one_or_a_list(predictor, pixels):
    assert predictor.predict([]) == []
    (found,) = predictor.predict([pixels])
    assert len(found) == 2
    found = predictor.predict([pixels, pixels[:30], pixels[:, :50]], batch_size=2)
    assert [one.size_hw for one in found] == [(60, 90), (30, 90), (60, 50)]
    sizes = [tuple(images.shape) for images, _ in predictor.model.seen[1:]]
    assert sizes == [(2, 3, 40, 63), (1, 3, 48, 40)]
    images, mask = predictor.model.seen[1]
    assert mask[0, :, 60:].all()
    assert not mask[0, :, :60].any()
    assert (images[0, :, mask[0]] == 0).all()  # padding is 0 after normalisation


def test_images_are_read_when_they_are_due(predictor, pixels):
    def images():
        for i in range(100):
            assert i < 4
            yield pixels

    batches = predictor.predict_batches(images(), batch_size=2)
    assert [len(next(batches)), len(next(batches))] == [2, 2]


def test_threshold(predictor, pixels):
    assert len(predictor.predict(pixels, threshold=0)) == 9  # 3 queries x 3 classes
    assert len(predictor.predict(pixels, threshold=0.7)) == 1
    none = predictor.predict(pixels, threshold=1)
    assert (len(none), list(none), none.boxes_xyxy.shape) == (0, [], (0, 4))
    for threshold in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
            predictor.predict(pixels, threshold=threshold)
    with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
        Predictor(StubModel(), CATEGORIES, threshold=50)


def test_max_detections(pixels):
    predictor = Predictor(StubModel(), CATEGORIES, image_size=40, max_detections=2, device="cpu")
    assert len(predictor.predict(pixels, threshold=0)) == 2


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (5, "a numpy array or a torch tensor, got int"),
        ("no/such/image.jpg", "there is no image no/such/image.jpg"),
        (np.zeros((3, 60, 90), np.uint8), "move the channels to the end"),
        (np.zeros((60, 90, 3), np.float32), r"got float32 \(60, 90, 3\): scale it"),
        (np.zeros((2, 60, 90, 3), np.uint8), "as a list"),
        (np.zeros((60, 90, 7), np.uint8), r"got uint8 \(60, 90, 7\)"),
        (np.zeros((0, 90, 3), np.uint8), r"got uint8 \(0, 90, 3\)"),
        (torch.zeros(60, 90, 3), "move the channels to the front"),
        (torch.zeros(2, 3, 60, 90), "as a list"),
        (torch.zeros(3, 0, 90), "got torch.float32"),
        (torch.zeros(3, 60, 90, dtype=torch.int64), "got torch.int64"),
        (torch.full((3, 60, 90), -2.0), r"values in \[-2, -2\]: pass it before normalisation"),
        (torch.full((3, 60, 90), 255.0), r"values in \[255, 255\]"),
        (torch.full((3, 60, 90), float("nan")), "values in"),
        (np.zeros((1, 300, 3), np.uint8), "300 x 1 pixels is too thin"),
    ],
)
def test_wrong_images_say_what_is_wrong(predictor, image, message):
    with pytest.raises(InputError, match=message):
        predictor.predict(image)


def test_a_bad_image_is_an_item_and_never_the_end(predictor, pixels, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    images = [pixels, tmp_path / "bad.jpg", pixels, 5, 5, pixels]
    batches = list(predictor.predict_batches(images, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 2]
    found = [one for batch in batches for one in batch]
    assert [isinstance(one, Detections) for one in found] == [True, False, True, False, False, True]
    assert found[1].path == tmp_path / "bad.jpg"
    assert "bad.jpg can't be read" in found[1].reason
    assert found[3] == found[4] == BadImage(None, found[3].reason)
    assert "got int" in found[3].reason
    assert [len(seen) for seen, _ in predictor.model.seen] == [1, 1, 1], "the others of a batch go on"
    assert list(predictor.predict_batches([5], batch_size=2)) == [[found[3]]]
    assert len(predictor.model.seen) == 3, "nothing runs for a batch without images"
    with pytest.raises(InputError, match=r"bad\.jpg can't be read"):
        predictor.predict(images, batch_size=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_function_is_a_network(predictor, pixels, dtype):
    """As a file that was exported is: nothing of it is moved, and it says what images it takes."""
    seen = []

    def network(images, mask):
        seen.append((images, mask))
        return {name: value.to(dtype) for name, value in StubModel().eval()(images, mask).items()}

    plain = Predictor(network, CATEGORIES, image_size=40, max_size=64, dtype=dtype)
    assert (plain.device, plain.dtype, plain.model) == (torch.device("cpu"), dtype, network)
    found, expected = plain.predict([pixels, pixels[:, :60]], batch_size=2), predictor.predict([pixels, pixels[:, :60]])
    for one, other in zip(found, expected):
        assert (one.names, one.boxes_xyxy.dtype, one.scores.dtype) == (other.names, torch.float32, torch.float32)
        assert torch.allclose(one.boxes_xyxy, other.boxes_xyxy, rtol=0.01)
        assert torch.allclose(one.scores, other.scores, atol=0.005)
    ((images, mask),) = seen
    assert (images.dtype, images.shape, mask.dtype) == (dtype, (2, 3, 40, 60), torch.bool)
    assert torch.allclose(images[0].float(), predictor.model.seen[0][0][0], atol=0.02)
    plain.predict(pixels)
    assert seen[1][1] is None, "where nothing is padded"
    images = torch.zeros(1, 3, 40, 60)
    assert len(plain.detect(images, None, torch.tensor([[60, 90]]))[0]["scores"]) == 9, "evaluation's way"
    assert seen[2][0].dtype == dtype


def test_only_a_module_can_be_optimized():
    def network(images, mask): ...

    with pytest.raises(InputError, match="optimize rewrites a PyTorch module, and network is none"):
        Predictor(network, CATEGORIES, optimize=True)


def test_another_mean_and_deviation(predictor, pixels):
    other = Predictor(
        StubModel(), CATEGORIES, image_size=40, max_size=64, mean=(0, 0, 0), std=(1, 0.5, 1), device="cpu"
    )
    other.predict([pixels, pixels[:, :60]], batch_size=2)
    images, mask = other.model.seen[0]
    resized = other.prepare(pixels).resized / 255
    assert torch.allclose(images[0], resized * torch.tensor([1.0, 2, 1]).view(3, 1, 1), atol=1e-6)
    assert (images[1].permute(1, 2, 0)[mask[1]] == 0).all()
    for mean, std in (((0, 0, 0), (1, 0, 1)), ((0, 0), (1, 1, 1)), ((0, 0, float("nan")), (1, 1, 1))):
        with pytest.raises(InputError, match="mean and std are three numbers each"):
            Predictor(StubModel(), CATEGORIES, mean=mean, std=std)


def test_wrong_options_say_what_is_wrong(predictor, pixels):
    with pytest.raises(InputError, match="batch_size"):
        predictor.predict([pixels], batch_size=0)
    with pytest.raises(InputError, match="The model has 3 classes, but 2 categories"):
        Predictor(StubModel(), CATEGORIES[:2], device="cpu").predict(pixels)


def test_non_finite_detections_are_left_out(predictor, pixels, monkeypatch, caplog):
    monkeypatch.setattr(f"{__name__}.QUERIES", [(float("nan"), 0.5, 0.5, 0.5), *QUERIES[1:]])
    assert predictor.predict(pixels).names == ["dog"]
    assert "NaN or infinite" in caplog.text


def test_same_preprocessing_and_numbers_as_evaluation(predictor, tmp_path):
    rng = np.random.default_rng(1)
    records = []
    for i, (height, width) in enumerate([(60, 90), (120, 50), (33, 200)]):
        path = tmp_path / f"{i}.jpg"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        cx, cy, w, h = QUERIES[0]
        box = np.array([[cx - w / 2 + 0.05, cy - h / 2, cx + w / 2, cy + h / 2]]) * [width, height, width, height]
        area, ignore = np.array([500], np.float32), np.array([False])
        records.append(ImageRecord(i + 1, path, (height, width), box.astype(np.float32), np.array([0]), area, ignore))
    annotations = Annotations("three", "coco", CATEGORIES, records, ())
    for normalize in (True, False):
        predictor.model.seen.clear()
        dataset = DetectionDataset(annotations, official_eval(40, 64), normalize=normalize, train=False)
        metrics = evaluate(predictor.detect, (collate([sample]) for sample in dataset), annotations)
        found = predictor.predict([record.path for record in records], threshold=0)
        seen = predictor.model.seen
        for (evaluated, _), (predicted, _) in zip(seen[:3], seen[3:]):
            assert torch.allclose(evaluated, predicted, atol=1e-6)
        saved = [result for record, one in zip(records, found) for result in one.to_coco(record.image_id)]
        evaluator = CocoEvaluator(annotations)
        columns = [{"boxes": one.boxes_xyxy, "scores": one.scores, "labels": one.labels} for one in found]
        evaluator.update([record.image_id for record in records], columns)
        assert evaluator.coco_results() == saved
        assert evaluator.compute().to_dict() == metrics.to_dict()
        assert 0 < metrics.AP < 1


def test_detections_as_coco_and_for_people(predictor, pixels, tmp_path):
    found = predictor.predict(pixels)
    with pytest.raises(InputError, match="needs an image id"):
        found.to_coco()
    first = found.to_coco(7)[0]
    assert first == {
        "image_id": 7,
        "category_id": 3,
        "bbox": [22.5, 15, 45, 30],
        "score": pytest.approx(0.8808, abs=1e-4),
    }
    plain = found.to_dict()
    assert (plain["width"], plain["height"], plain["path"]) == (90, 60, None)
    assert plain["detections"][0] == {
        "name": "cat",
        "score": 0.8808,
        "box_xyxy": [22.5, 15, 67.5, 45],
        "category_id": 3,
        "label": 0,
    }
    assert [one.name for one in found] == found.names
    assert len(found.filter(0.7)) == 1


def test_detections_check_their_shapes():
    right = {
        "boxes_xyxy": torch.zeros(2, 4),
        "scores": torch.zeros(2),
        "labels": torch.zeros(2, dtype=torch.int64),
        "category_ids": torch.zeros(2, dtype=torch.int64),
        "names": ["a", "b"],
        "size_hw": (10, 20),
    }
    assert len(Detections(**right)) == 2
    with pytest.raises(InputError, match=r"Expected boxes_xyxy \(2, 4\) for 2 names, got \(2, 5\)"):
        Detections(**{**right, "boxes_xyxy": torch.zeros(2, 5)})
    with pytest.raises(InputError, match=r"Expected scores \(3,\) for 3 names, got \(2,\)"):
        Detections(**{**right, "names": ["a", "b", "c"], "boxes_xyxy": torch.zeros(3, 4)})
    with pytest.raises(InputError, match="size_hw"):
        Detections(**{**right, "size_hw": (0, 20)})


def test_drawing(predictor, pixels, tmp_path):
    found = predictor.predict(pixels)
    picture = found.draw(pixels)
    assert picture.size == (90, 60)
    assert not np.array_equal(np.asarray(picture), pixels)
    assert found.draw(pixels, min_side=200).size == (360, 240)
    with pytest.raises(InputError, match="pass the image"):
        found.draw()
    with pytest.raises(InputError, match="image of 90 x 60 pixels that was predicted on, got 60 x 90"):
        found.draw(pixels.transpose(1, 0, 2))


@pytest.mark.filterwarnings("ignore")  # supervision warns where OpenCV is missing
def test_supervision(predictor, pixels):
    pytest.importorskip("supervision", reason="needs the extra viz")
    converted = predictor.predict(pixels).to_supervision()
    assert converted.xyxy.shape == (2, 4)
    assert converted.class_id.tolist() == [0, 1]
    assert converted.data["class_name"].tolist() == ["cat", "dog"]
    assert converted.data["category_id"].tolist() == [3, 17]
    assert len(predictor.predict(pixels, threshold=1).to_supervision()) == 0


def test_supervision_missing(predictor, pixels, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match=r"pip install 'ddetr\[viz\]'"):
        predictor.predict(pixels).to_supervision()


def tiny_model(**options):
    from ddetr.models.deformable_detr import DeformableDETR

    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "num_queries": 10, "enc_layers": 1, "dec_layers": 1, "dim_feedforward": 32, "nheads": 4}
    return DeformableDETR(**{"num_classes": 3, "backbone": "resnet18", **sizes, **options})


def test_the_real_model(pixels):
    predictor = Predictor(tiny_model(), CATEGORIES, image_size=64, max_size=107, device="cpu")
    alone = predictor.predict(pixels, threshold=0)
    assert len(alone) == 30
    assert alone.scores.tolist() == sorted(alone.scores.tolist(), reverse=True)
    together = predictor.predict([pixels, pixels[:, :60]], threshold=0, batch_size=2)
    assert together[0].boxes_xyxy.sum(dim=0).tolist() == pytest.approx(alone.boxes_xyxy.sum(dim=0).tolist(), rel=0.01)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_from_checkpoint(pixels, tmp_path, suffix):
    from ddetr.checkpoint import Checkpoint, save_checkpoint

    model = tiny_model()
    path = tmp_path / f"best{suffix}"
    save_checkpoint(path, Checkpoint.of(model, CATEGORIES, image_size=64, max_size=107, threshold=0.005))
    predictor = Predictor.from_checkpoint(path, device="cpu")
    assert (predictor.image_size, predictor.max_size, predictor.threshold) == (64, 107, 0.005)
    assert predictor.categories == CATEGORIES
    expected = Predictor(model, CATEGORIES, image_size=64, max_size=107, threshold=0.005, device="cpu").predict(pixels)
    found = predictor.predict(pixels)
    assert found.to_dict() == expected.to_dict()
    assert len(found) > 0
    assert set(found.category_ids.tolist()) <= {3, 17, 90}
    assert Predictor.from_checkpoint(path, device="cpu", threshold=0.9, image_size=32).image_size == 32


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_with_another_mean(pixels, tmp_path, suffix):
    """As of weights that were trained elsewhere: images are normalised as those want it."""
    from ddetr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

    path, colors = tmp_path / f"best{suffix}", {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.5, 1.0)}
    model = tiny_model()
    usual = Predictor(model, CATEGORIES, image_size=64, max_size=107, device="cpu").predict(pixels, threshold=0)
    model.image_mean, model.image_std = colors["mean"], colors["std"]
    save_checkpoint(path, Checkpoint.of(model, CATEGORIES, image_size=64, max_size=107))
    predictor = Predictor.from_checkpoint(path, device="cpu")
    assert (predictor.mean, predictor.std) == (colors["mean"], colors["std"])
    found = predictor.predict(pixels, threshold=0)
    same = Predictor(model, CATEGORIES, image_size=64, max_size=107, device="cpu", **colors).predict(
        pixels, threshold=0
    )
    assert torch.equal(found.scores, same.scores)
    assert not torch.equal(found.scores, usual.scores)
    content = load_checkpoint(path)
    del content.input["mean"], content.input["std"]  # a file without them means ImageNet's
    save_checkpoint(path, content)
    assert torch.equal(Predictor.from_checkpoint(path, device="cpu").predict(pixels, threshold=0).scores, usual.scores)


def test_from_checkpoints_that_do_not_fit(tmp_path):
    from ddetr.checkpoint import Checkpoint, save_checkpoint

    with pytest.raises(InputError, match=r"no\.pth"):
        Predictor.from_checkpoint(tmp_path / "no.pth")
    path = tmp_path / "odd.pth"
    odd = Checkpoint.of(tiny_model(), CATEGORIES)
    odd.input["mean"] = [0.5, 0.5]
    save_checkpoint(path, odd)
    with pytest.raises(InputError, match="mean and std are three numbers"):
        Predictor.from_checkpoint(path)
    save_checkpoint(path, Checkpoint.of(tiny_model(), CATEGORIES, threshold=float("nan")))
    assert Predictor.from_checkpoint(path, device="cpu").threshold == 0.5


def test_from_weights_of_another_project(pixels, tmp_path):
    """Without a configuration: what the weights do not show is as published."""
    from ddetr.checkpoint import to_official_state_dict

    model = tiny_model(num_classes=91, nheads=8)
    torch.save({"model": to_official_state_dict(model)}, tmp_path / "official.pth")
    predictor = Predictor.from_checkpoint(tmp_path / "official.pth", device="cpu", image_size=64, max_size=107)
    coco = [Category(i, str(i)) for i in range(91)]
    expected = Predictor(model, coco, image_size=64, max_size=107, device="cpu").predict(pixels, threshold=0)
    found = predictor.predict(pixels, threshold=0)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.category_ids, expected.category_ids)
    assert predictor.categories[18].name == "dog"


def saved(path, **options):
    from ddetr.checkpoint import Checkpoint, save_checkpoint

    save_checkpoint(path, Checkpoint.of(tiny_model(**options), CATEGORIES, image_size=64, max_size=107))
    return path


def test_a_two_stage_network_works_with_any_number_of_queries(pixels, tmp_path):
    path = saved(tmp_path / "c.pth", with_box_refine=True, two_stage=True)
    for num_queries in (3, 40):
        predictor = Predictor.from_checkpoint(path, "cpu", num_queries=num_queries, max_detections=1000)
        assert len(predictor.predict(pixels, threshold=0)) == num_queries * 3
    with pytest.raises(InputError, match="num_queries must be at least 1, got 0"):
        Predictor.from_checkpoint(path, "cpu", num_queries=0)


def test_a_two_stage_network_chooses_its_queries_as_asked(tmp_path):
    path = saved(tmp_path / "c.pth", with_box_refine=True, two_stage=True)
    assert Predictor.from_checkpoint(path, "cpu").model.transformer.query_selection == "topk"
    predictor = Predictor.from_checkpoint(path, "cpu", query_selection="peaks")
    assert predictor.model.config["query_selection"] == predictor.model.transformer.query_selection == "peaks"
    trained = saved(tmp_path / "d.pth", with_box_refine=True, two_stage=True, query_selection="distinct")
    assert Predictor.from_checkpoint(trained, "cpu").model.transformer.query_selection == "distinct"


def test_mixed_queries_are_at_most_as_many_as_were_learned(pixels, tmp_path):
    path = saved(tmp_path / "c.pth", with_box_refine=True, two_stage=True, mixed_selection=True)
    fewer = Predictor.from_checkpoint(path, "cpu", num_queries=3, max_detections=1000)
    assert len(fewer.predict(pixels, threshold=0)) == 3 * 3
    trained = Predictor.from_checkpoint(path, "cpu")
    assert fewer.model.query_embed.weight.equal(trained.model.query_embed.weight[:3])
    many = trained.model.num_queries + 1
    with pytest.raises(InputError, match=f"num_queries {many}: .*choose at most {many - 1}"):
        Predictor.from_checkpoint(path, "cpu", num_queries=many)
    for contents in (None, torch.tensor(1.0)):  # what anybody can write
        checkpoint = load_checkpoint(path)
        weights = {name: value for name, value in checkpoint.model.items() if name != "query_embed.weight"}
        weights |= {} if contents is None else {"query_embed.weight": contents}
        with pytest.raises(InputError, match="the weights of the checkpoint do not fit|the weights do not fit"):
            build_from_checkpoint(replace(checkpoint, model=weights), num_queries=3)


@pytest.mark.parametrize("choice", [{"num_queries": 5}, {"query_selection": "peaks"}])
def test_learned_queries_are_as_many_as_were_learned(choice, tmp_path):
    path = saved(tmp_path / "c.pth")
    with pytest.raises(InputError, match=f"{next(iter(choice))} can be chosen for a two-stage network alone"):
        Predictor.from_checkpoint(path, "cpu", **choice)
