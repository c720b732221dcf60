"""Which images an epoch takes, in which order, and which of them run through the network together."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from ddetr.datasets.dataset import Turn, sample_seed

SizeOf = Callable[[int, int], tuple[int, int]]  # index and seed of a sample -> its (h, w) after augmentation


class EpochOrder(Sampler[Turn]):
    """The turns (index, seed, strong) of this process for one epoch: its share of every global batch of a seeded
    permutation.

    What is left of the last, incomplete global batch is dropped, as in the official recipe.

    Args:
        num_images: of the data set.
        batch_size: of a global batch.
        seed, epoch: decide the order; the seed of a sample comes from them and its index.
        rank, world_size: this process, and how many there are.
        start: (epoch, batch): that epoch begins with this global batch, as if those before it had been taken.
        device_batch_size: images of a micro-batch, for `size_of`.
        size_of: the images of a global batch are sorted into micro-batches of similar shape (`similar_together`). Which
            images a global batch has does not change.
        strong_epochs: the first so many epochs have strong augmentation; None for all. Loader processes, which live
            longer than an epoch, learn it from each turn.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
        device_batch_size: int = 1,
        size_of: SizeOf | None = None,
        strong_epochs: int | None = None,
    ):
        self.num_images, self.batch_size, self.seed, self.epoch = num_images, batch_size, seed, epoch
        self.rank, self.world_size, self.start = rank, world_size, start
        self.device_batch_size, self.size_of = device_batch_size, size_of
        self.strong_epochs = strong_epochs

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Of the whole epoch, wherever it starts: the progress of a resumed run counts on it."""
        return self.num_images // self.batch_size * self.batch_size // self.world_size

    def __iter__(self) -> Iterator[Turn]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch, self.num_images))
        order = torch.randperm(self.num_images, generator=generator)
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        first_epoch, first_batch = self.start
        strong = self.strong_epochs is None or self.epoch < self.strong_epochs
        for batch in range(first_batch if self.epoch == first_epoch else 0, self.num_images // self.batch_size):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            if self.size_of is not None:
                sizes_hw = [self.size_of(index, sample_seed(self.seed, self.epoch, index)) for index in indices]
                places = similar_together(sizes_hw, self.device_batch_size, self.world_size)
                indices = [indices[place] for place in places]
            for index in indices[mine]:
                yield Turn(index, sample_seed(self.seed, self.epoch, index), strong)


def similar_together(sizes_hw: Sequence[tuple[int, int]], device_batch_size: int, world_size: int = 1) -> list[int]:
    """An order of a global batch in which each process's share, cut into micro-batches, needs little padding.

    Each micro-batch is begun by the largest image that is left and filled with those that add the least padding to it;
    then the micro-batches are dealt out so that the processes have about the same number of pixels.

    Args:
        sizes_hw: (h, w) of each image; their number is divisible by `world_size`.
        device_batch_size: images of a micro-batch; the last one of a share is smaller where it does not divide the
            share.
        world_size: shares: the first process takes the first part of the order, and so on.

    Returns:
        The places of the images, each once.
    """
    share = len(sizes_hw) // world_size
    full, rest = divmod(share, device_batch_size)
    lengths = [device_batch_size] * (full * world_size) + ([rest] * world_size if rest else [])
    left = sorted(range(len(sizes_hw)), key=lambda place: (-sizes_hw[place][0] * sizes_hw[place][1], place))
    groups = []
    for length in lengths:
        group = [left.pop(0)]
        height, width = sizes_hw[group[0]]
        while len(group) < length:

            def padding(place: int, height: int = height, width: int = width, after: int = len(group) + 1) -> int:
                h, w = sizes_hw[place]
                return max(height, h) * max(width, w) * after - h * w

            best = min(left, key=padding)
            left.remove(best)
            group.append(best)
            height, width = max(height, sizes_hw[best][0]), max(width, sizes_hw[best][1])
        groups.append((height * width * length, group))
    shares: list[list[int]] = [[] for _ in range(world_size)]
    pixels = [0] * world_size
    num_full = full * world_size
    for dealt, quota in ((groups[:num_full], share - rest), (groups[num_full:], share)):
        for cost, group in sorted(dealt, key=lambda pair: -pair[0]):
            rank = min((r for r in range(world_size) if len(shares[r]) < quota), key=pixels.__getitem__)
            shares[rank] += group
            pixels[rank] += cost
    return [place for places in shares for place in places]
