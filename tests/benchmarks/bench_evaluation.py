"""Measure how fast students train: images per second per architecture, augmentation and testing included.

python tests/benchmarks/bench_evaluation.py --resolution 32 --student convnet:32 --student resnet_ap10:16
python tests/benchmarks/bench_evaluation.py --resolution 224 --device cuda --amp --channels-last
"""

import argparse
from dataclasses import replace

import torch

from workflow_scripts.evaluation.architectures import ARCHITECTURES, display_name
from workflow_scripts.evaluation.training import Recipe, train_student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", action="append", help="NAME or NAME:WIDTH, repeatable; default: all, full width")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=100, help="training images")
    parser.add_argument("--test-images", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs, after one that warms up")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast (CUDA)")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    draw = torch.Generator().manual_seed(0)

    def images_and_labels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (count, 3, args.resolution, args.resolution)
        images = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        return images, torch.randint(0, args.classes, (count,), generator=draw)

    data = (*images_and_labels(args.images), *images_and_labels(args.test_images))
    for student in args.student or ARCHITECTURES:
        name, _, width = student.partition(":")
        recipe = Recipe(
            architecture=name,
            width=int(width) if width else None,
            resolution=args.resolution,
            classes=args.classes,
            epochs=args.epochs,
            batch_size=args.batch_size,
            evaluations=1,
            amp=args.amp,
        )
        train_student(replace(recipe, epochs=1), *data, device=args.device, channels_last=args.channels_last)
        score = train_student(recipe, *data, device=args.device, channels_last=args.channels_last)
        title = display_name(name, resolution=args.resolution, width=recipe.width)
        rate = score.images_seen / score.seconds
        print(f"{title:20} {args.resolution} px  {args.device}  {rate:10.1f} images/s", flush=True)


if __name__ == "__main__":
    main()
