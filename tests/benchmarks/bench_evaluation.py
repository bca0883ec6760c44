"""Measure how fast students train: images per second, augmentation and testing included.

python tests/benchmarks/bench_evaluation.py --resolution 32 --student convnet:32 --student resnet_ap10:16
python tests/benchmarks/bench_evaluation.py --resolution 32 --student convnet:16 --ordinary --at-once 3
python tests/benchmarks/bench_evaluation.py --resolution 224 --device cuda --dtype bfloat16 --compile

``--ordinary`` also times the loop that most people write: PNG files in an ImageFolder, transforms of one PIL image after
another in a DataLoader, the same network, losses and steps. ``cpu`` is processor time, which a busy machine does not stretch.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from workflow_scripts.evaluation.architectures import build, display_name
from workflow_scripts.evaluation.augment import IMAGENET_MEAN, IMAGENET_STD, lighting_offsets
from workflow_scripts.evaluation.training import Labelled, Recipe, can_stack, train_students
from workflow_scripts.stages.common import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--student", action="append", help="NAME or NAME:WIDTH, repeatable; default: the hard-label ones"
    )
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=100, help="training images")
    parser.add_argument("--test-images", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs, after one that warms up")
    parser.add_argument("--repeats", type=int, default=3, help="timings, of which the shortest counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--workers", type=int, default=0, help="processes of the ordinary DataLoader")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--at-once", type=int, default=1, help="students trained at once")
    parser.add_argument("--ordinary", action="store_true", help="compare with a DataLoader of PIL images")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    draw = torch.Generator().manual_seed(0)

    def images_and_labels(count: int) -> Labelled:
        shape = (count, 3, args.resolution, args.resolution)
        images = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        return images, torch.arange(count) % args.classes

    train, test = images_and_labels(args.images), images_and_labels(args.test_images)
    with tempfile.TemporaryDirectory() as folder:
        if args.ordinary:
            for name, data in (("train", train), ("test", test)):
                write(Path(folder) / name, data)
        for student in args.student or ("convnet", "resnet_ap10", "resnet18"):
            name, _, width = student.partition(":")
            recipe = Recipe(
                architecture=name,
                width=int(width) if width else None,
                resolution=args.resolution,
                classes=args.classes,
                epochs=args.epochs,
                batch_size=args.batch_size,
                evaluations=1,
                dtype=args.dtype,
            )
            title = display_name(name, resolution=args.resolution, width=recipe.width)

            def ours(recipe: Recipe, students: int) -> None:
                recipes = [replace(recipe, seed=seed) for seed in range(students)]
                train_students(recipes, [train] * students, test, device=args.device, compiled=args.compile)

            def theirs(recipe: Recipe, students: int) -> None:
                ordinary(recipe, Path(folder), args.device, args.workers)

            kinds: list[tuple[str, Callable[[Recipe, int], None], int]] = [("ours", ours, 1)]
            if args.at_once > 1 and can_stack(recipe):
                kinds.append((f"{args.at_once} at once", ours, args.at_once))
            if args.ordinary:
                kinds.insert(0, ("ordinary", theirs, 1))
            found = {}
            for kind, loop, students in kinds:
                if loop is ours:
                    keep_freed_memory()  # as stages do, for all that comes after
                loop(replace(recipe, epochs=1), students)
                times = [timed(partial(loop, recipe, students)) for _ in range(args.repeats)]
                seen = args.epochs * args.images * students
                wall, cpu = (seen / min(column) for column in zip(*times, strict=True))
                found[kind] = cpu
                print(f"{title:20} {args.resolution} px  {kind:12} {wall:9.1f} images/s  {cpu:9.1f} per cpu second")
            for kind in found:
                if kind != "ours":
                    print(
                        f"{title:20} ours is {found['ours'] / found[kind]:.2f} times as fast as {kind} (cpu)",
                        flush=True,
                    )


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Return wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def write(folder: Path, data: Labelled) -> None:
    """Write images as CLASS/NUMBER.png."""
    for number, (image, label) in enumerate(zip(*data, strict=True)):
        place = folder / f"{label.item():04d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:05d}.png")


def ordinary(recipe: Recipe, folder: Path, device: str, workers: int) -> None:
    """Train as the hard-label protocol's published code is built: one image after another through PIL."""
    whole = [transforms.Resize(recipe.resolution), transforms.CenterCrop(recipe.resolution), transforms.ToTensor()]
    normalise = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    varied = [
        *whole,
        transforms.RandomResizedCrop(recipe.resolution, scale=recipe.crop_scale, antialias=True),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(recipe.jitter, recipe.jitter, recipe.jitter),
        transforms.Lambda(lambda x: x + lighting_offsets(torch.randn(1, 3) * recipe.lighting)[0, :, None, None]),
        normalise,
    ]
    train, test = (
        ImageFolder(folder / name, transforms.Compose(chain))
        for name, chain in (("train", varied), ("test", [*whole, normalise]))
    )
    loader = DataLoader(train, recipe.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    network = build(recipe.architecture, classes=recipe.classes, resolution=recipe.resolution, width=recipe.width)
    network = network.to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    for _ in range(recipe.epochs):
        for batch in loader:
            images, labels = (tensor.to(device) for tensor in batch)
            share, partners = torch.rand(()).item(), torch.randperm(len(images), device=device)
            half = int(recipe.resolution * (1 - share) ** 0.5) // 2
            y, x = (int(place) for place in torch.randint(recipe.resolution, (2,)))
            rows, columns = slice(max(y - half, 0), y + half), slice(max(x - half, 0), x + half)
            images[:, :, rows, columns] = images[partners, :, rows, columns]
            pasted = images[0, 0, rows, columns].numel() / recipe.resolution**2
            logits = network(images)
            loss = (1 - pasted) * F.cross_entropy(logits, labels) + pasted * F.cross_entropy(logits, labels[partners])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # as every loop that prints its loss
    network.eval()
    with torch.inference_mode():
        for images, labels in DataLoader(test, 256, num_workers=workers):
            (network(images.to(device)).argmax(1) == labels.to(device)).sum().item()


if __name__ == "__main__":
    main()
