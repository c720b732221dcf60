"""Images in, named objects in pixels of those images out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from ddetr.datasets.annotations import Category
from ddetr.datasets.collate import collate
from ddetr.datasets.image_input import ImageInput, as_rgb
from ddetr.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, checked_colors, normalize_images, official_eval
from ddetr.errors import InputError
from ddetr.inference.detections import Detections
from ddetr.inference.optimize import Optimization, optimize_model
from ddetr.models.postprocess import PostProcess
from ddetr.models.query_selection import QuerySelection
from ddetr.printable import one_line
from ddetr.runtime.device import choose_device
from ddetr.runtime.transfer import sent
from ddetr.untrusted import MAX_SIDE

__all__ = ["BadImage", "Network", "Predictor", "PreparedImage"]

log = logging.getLogger(__name__)

# (images (N, 3, H, W) normalised, mask (N, H, W) bool or None where nothing is padded) -> `pred_logits` (N, Q, K) and
# `pred_boxes` (N, Q, 4) cxcywh in [0, 1]; the mask is True at padding
Network = Callable[[Tensor, Tensor | None], dict[str, Any]]


class PreparedImage(NamedTuple):
    """An image that was read and resized, before it is put into a batch."""

    image: Tensor  # (3, H, W) uint8, the original, upright
    resized: Tensor  # (3, h, w) uint8, the model's size
    path: Path | None

    @property
    def size_hw(self) -> tuple[int, int]:
        """Of the original."""
        return self.image.shape[1], self.image.shape[2]


class BadImage(NamedTuple):
    """What stands in the place of an image's detections where it can not be read, or not be used."""

    path: Path | None  # None where the image did not come from a file
    reason: str


class Predictor:
    """A network with everything that belongs to predicting with it: classes, image size, threshold, device.

    The images go the way of evaluation's: same decoding, same resizing, same padding.
    """

    def __init__(
        self,
        model: Network,
        categories: Sequence[Category],
        *,
        image_size: int = 800,
        max_size: int = 1333,
        max_detections: int = 100,
        threshold: float = 0.5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        optimize: bool | Optimization = False,
    ):
        """
        Args:
            model: any function with `model(images, mask)` that gives `pred_logits` (N, Q, K) and `pred_boxes`
                (N, Q, 4). A PyTorch module is moved to the device and put into evaluation mode; other functions are
                taken as they are.
            categories: the K classes, by label.
            image_size: short side in pixels that images are resized to.
            max_size: limit for the long side, in pixels.
            max_detections: the most objects per image.
            threshold: least score of an object, where `predict` is given none.
            mean, std: of red, green and blue in [0, 1], with which the network was trained; by default the model's own
                `image_mean` and `image_std`, where it has them, and ImageNet's for any other function.
            device: where the network takes its images; by default a GPU if there is one, and for a function that is no
                module the CPU.
            dtype: of the images that the network takes; weights keep theirs.
            optimize: work with a faster copy of the model (`ddetr.inference.optimize.optimize_model`): True or
                "float32" changes nothing but rounding; "bfloat16" and "compile" are faster and less precise.

        Raises:
            InputError: an option that can not be, or `optimize` for what is no PyTorch module.
        """
        self.threshold = _checked_threshold(threshold)
        is_module = isinstance(model, nn.Module)
        self.device = choose_device(device if device is not None or is_module else "cpu")
        self.model: Network = model.to(self.device).eval() if is_module else model
        if optimize:
            if not is_module:
                name = getattr(model, "__name__", type(model).__name__)
                raise InputError(f"optimize rewrites a PyTorch module, and {name} is none.")
            self.model = optimize_model(self.model, "float32" if optimize is True else optimize)
        self.dtype = dtype
        self.mean, self.std = checked_colors(
            getattr(model, "image_mean", IMAGENET_MEAN) if mean is None else mean,
            getattr(model, "image_std", IMAGENET_STD) if std is None else std,
        )
        self.categories = tuple(categories)
        self.image_size, self.max_size = _checked_sizes(image_size, max_size)
        self._transform = official_eval(image_size, max_size)
        self._postprocess = PostProcess(max_detections)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | PathLike,
        device: str | torch.device | None = None,
        *,
        num_queries: int | None = None,
        query_selection: QuerySelection | None = None,
        **options,
    ) -> Predictor:
        """Of a checkpoint that `save_checkpoint` wrote: its model, classes, image size, mean, deviation and threshold;
        or of any trained Deformable DETR of another project, as `ddetr.checkpoint.read_detector` reads it.

        Args:
            path: the checkpoint file; the folder, where transformers wrote it.
            device: where to run; by default a GPU if there is one.
            num_queries: of a two-stage network, how many it works with: more for crowded images, fewer for speed; by
                default as it was trained.
            query_selection: of a two-stage network, how it chooses them, "topk", "peaks" or "distinct"; by default as
                it was trained.
            options: any other option of the constructor, instead of what the checkpoint says.
        """
        from ddetr.checkpoint import build_from_checkpoint, read_detector

        checkpoint = read_detector(path)
        saved = {name: checkpoint.input.get(name) for name in ("image_size", "max_size")}
        if 0 <= checkpoint.threshold <= 1:  # it is NaN where no threshold found anything
            saved["threshold"] = checkpoint.threshold
        model = build_from_checkpoint(checkpoint, num_queries=num_queries, query_selection=query_selection)
        return cls(model, checkpoint.categories, device=device, **{**saved, **options})

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike,
        device: str | torch.device | None = None,
        *,
        num_queries: int | None = None,
        query_selection: QuerySelection | None = None,
        **options,
    ) -> Predictor:
        """Of trained weights by a name, downloaded where they are not on this machine.

        Args:
            source: a name of `ddetr weights list`, a hub id (ORG/NAME, with @REVISION and /FILE where wanted), an https
                address, a file or a folder.
            device, num_queries, query_selection, options: as `from_checkpoint`.

        Raises:
            InputError: there is no such thing, it cannot be had, or it holds no detector.
        """
        from ddetr.weight_files.sources import find_weights

        path = find_weights(source if isinstance(source, str) else Path(source))
        return cls.from_checkpoint(path, device, num_queries=num_queries, query_selection=query_selection, **options)

    def predict(
        self, images: ImageInput | Sequence[ImageInput], threshold: float | None = None, batch_size: int = 1
    ) -> Detections | list[Detections]:
        """Finds the objects in an image, or in each of a list of them.

        Args:
            images: a path, Pillow image, numpy array uint8 (h, w, 3) RGB or (h, w) grey, tensor uint8 or float in
                [0, 1] (3, h, w); or a list of these.
            threshold: least score; by default the predictor's own.
            batch_size: images that run through the model together. Padding to a common size changes the scores
                slightly; 1 has none.

        Returns:
            `Detections` for an image, a list of them for a list.

        Raises:
            InputError: an image that can not be read or used, or an option that can not be.
        """
        if not isinstance(images, (list, tuple)):
            return self.predict([images], threshold)[0]
        found = []
        for batch in self.predict_batches(images, threshold, batch_size):
            for one in batch:
                if isinstance(one, BadImage):
                    raise InputError(one.reason)
                found.append(one)
        return found

    def predict_batches(
        self, images: Iterable[ImageInput], threshold: float | None = None, batch_size: int = 1
    ) -> Iterator[list[Detections | BadImage]]:
        """The same one batch after another, for many images or a progress bar; images are read when they are due.

        An image that can not be read or used is a `BadImage` in its place, and the batch goes on.
        """
        for batch in self.prepare_batches(images, batch_size):
            yield self.predict_prepared(batch, threshold)

    def prepare_batches(
        self, images: Iterable[ImageInput], batch_size: int = 1
    ) -> Iterator[list[PreparedImage | BadImage]]:
        """What `predict_batches` gives to `predict_prepared`: for who needs the pixels beside what is found in them."""
        check_batch_size(batch_size)
        batch: list[PreparedImage | BadImage] = []
        for image in images:
            try:
                batch.append(self.prepare(image))
            except InputError as error:
                batch.append(BadImage(_path_of(image), str(error)))
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def prepare(self, image: ImageInput) -> PreparedImage:
        """Reads, checks and resizes one image; raises `InputError` where that can not be done."""
        rgb = as_rgb(image)
        size_hw = (rgb.shape[1], rgb.shape[2])
        if self.max_size * min(size_hw) < max(size_hw):
            raise InputError(
                f"An image of {size_hw[1]} x {size_hw[0]} pixels is too thin: nothing is left of it at "
                f"{self.max_size} pixels. Cut it into parts."
            )
        no_objects = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size_hw)
        resized, _ = self._transform(tv_tensors.Image(rgb), {"boxes": no_objects, "area": torch.zeros(0)})
        return PreparedImage(rgb, resized.as_subclass(Tensor), _path_of(image))

    def predict_prepared(
        self, batch: Sequence[PreparedImage | BadImage], threshold: float | None = None
    ) -> list[Detections | BadImage]:
        """Finds the objects in a batch of prepared images; a bad image stays in its place."""
        threshold = self.threshold if threshold is None else _checked_threshold(threshold)
        good = [one for one in batch if isinstance(one, PreparedImage)]
        if not good:
            return list(batch)
        images, mask, _ = collate([(image.resized, {}) for image in good])
        found = self.detect(images, mask if mask.any() else None, torch.tensor([image.size_hw for image in good]))
        detections = (
            Detections.from_labels(self._sound(one), self.categories, image.size_hw, image.path).filter(threshold)
            for one, image in zip(found, good)
        )
        return [next(detections) if isinstance(one, PreparedImage) else one for one in batch]

    @torch.no_grad()
    def detect(self, images: Tensor, mask: Tensor | None, target_sizes_hw: Tensor) -> list[dict[str, Tensor]]:
        """The predict function that `ddetr.evaluation.evaluator.evaluate` takes: no threshold, as evaluation needs it.

        Args:
            images: (N, 3, H, W), uint8, or float that is normalised as the network wants it.
            mask: (N, H, W) bool, True = padding; None where nothing is padded.
            target_sizes_hw: (N, 2) original heights and widths.

        Returns:
            N dicts on the CPU: `scores` (k,), `labels` (k,), `boxes` (k, 4) xyxy in pixels of the originals.
        """
        images, mask = sent(images, self.device), None if mask is None else sent(mask, self.device)
        if images.dtype == torch.uint8:
            images = normalize_images(images, mask, self.mean, self.std)
        outputs = self.model(images.to(self.dtype), mask)
        num_classes = outputs["pred_logits"].shape[-1]
        if num_classes != len(self.categories):
            raise InputError(f"The model has {num_classes} classes, but {len(self.categories)} categories were given.")
        found = self._postprocess(outputs, target_sizes_hw)
        sizes = [len(one["scores"]) for one in found]
        columns = {name: torch.cat([one[name] for one in found]).cpu().split(sizes) for name in found[0]}
        return [dict(zip(columns, one)) for one in zip(*columns.values())]

    def _sound(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        finite = torch.isfinite(found["boxes"]).all(dim=1) & torch.isfinite(found["scores"])
        if finite.all():
            return found
        log.warning("%d detections were NaN or infinite and were left out.", int((~finite).sum()))
        return {name: values[finite] for name, values in found.items()}


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")


def _checked_threshold(threshold: float) -> float:
    if not 0 <= threshold <= 1:
        raise InputError(f"The score threshold must lie in [0, 1], got {threshold}.")
    return float(threshold)


def _checked_sizes(image_size: int, max_size: int) -> tuple[int, int]:
    for name, size in (("image_size", image_size), ("max_size", max_size)):
        if not isinstance(size, int) or not 1 <= size <= MAX_SIDE:
            raise InputError(f"{name} is a whole number of pixels from 1 to {MAX_SIDE}, got {one_line(size)}.")
    return image_size, max_size


def _path_of(image: ImageInput) -> Path | None:
    return Path(image) if isinstance(image, (str, PathLike)) else None
