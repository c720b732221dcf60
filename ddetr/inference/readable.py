"""Images of a data set for evaluation, of which some may turn out to be damaged: those are named and left out."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ddetr.datasets import DetectionDataset, collate
from ddetr.errors import InputError
from ddetr.inference.predictor import BadImage


class ReadableImages(Dataset):
    """`images[i]` is the sample of `dataset`, or a `BadImage` where its file can't be read."""

    def __init__(self, dataset: DetectionDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]] | BadImage:
        try:
            return self.dataset[index]
        except InputError as error:
            return BadImage(self.dataset.annotations.images[index].path, str(error))


def collate_readable(samples: Sequence[Any]) -> tuple[Any, list[BadImage]]:
    """(what `collate` makes of the samples, or None where there are none; the bad images)."""
    bad = [sample for sample in samples if isinstance(sample, BadImage)]
    good = [sample for sample in samples if not isinstance(sample, BadImage)]
    return collate(good) if good else None, bad
