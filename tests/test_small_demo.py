"""What the notebooks fall back on where nothing was trained."""

from pathlib import Path

from ddetr.demo import SMALL_MODEL, small_demo
from ddetr.inference.predictor import Predictor


def test_it_leaves_a_detector_and_its_data_beside_it(tmp_path: Path) -> None:
    result = small_demo(str(tmp_path / "runs" / "small"), num_train=16, num_val=2, epochs=1)
    assert result.path == tmp_path / "runs" / "small"
    assert result.data_path == tmp_path / "runs" / "shapes-96-16-2-0"
    predictor = Predictor.from_checkpoint(result.path / "best.pth")
    assert [category.name for category in predictor.categories] == ["circle", "square", "triangle"]
    assert predictor.model.config["hidden_dim"] == SMALL_MODEL["hidden_dim"]
    assert len(predictor.predict(result.image_example, threshold=0)) > 0
