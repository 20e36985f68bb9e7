"""How long a local epoch of Net takes, beside the ancestor's way and beside the bare step.

    python benchmarks/local_epoch.py --data_dir data

Three ways take turns in one process, each an epoch over the same images, batch 32:

    2020   PIL images, transforms per image, DataLoader, SGD (benchmarks/ancestor.py)
    ours   utils.TrainLoader and utils.train
    bare   the same step as ours, again and again on one batch that is in memory already

A ratio is taken between neighbours in one turn, so that other load on the machine weighs on
both. At the end both ways run from the same weights over the same batches with the same
optimizer; their losses must agree, else the exit status is 1.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

import utils
from benchmarks import ancestor
from federated.errors import FederationError
from federated.settings import Settings

BATCH_SIZE = 32
# Of the loss, in each of 100 steps at 2020's learning rate, where rounding in another order
# stays below 1e-5. At 20 times that rate training itself magnifies it to 1e-2.
TOLERANCE = 1e-4
PROOF_LR = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(description="time a local epoch of Net in three ways")
    parser.add_argument(
        "--data_dir", "--data-dir", default="data", help="as for client.py (default: data)"
    )
    parser.add_argument("--images", type=int, default=25_000, help="an epoch (default: 25000)")
    parser.add_argument("--repeats", type=int, default=5, help="of each way (default: 5)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: one per core)")
    parser.add_argument("--short", action="store_true", help="640 synthetic images, 2 repeats")
    args = parser.parse_args()
    if args.short:
        args.data_dir, args.images, args.repeats = "synthetic:640", 640, 2
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        data = some_images(args.data_dir, args.images)
    except FederationError as error:
        sys.exit(f"local_epoch.py: {error}")
    print(f"{len(data):,} {data.source}, batch {BATCH_SIZE}, threads {torch.get_num_threads()}")

    ways = {"2020": epoch_of_2020, "ours": our_epoch, "bare": bare_steps}
    for way in ways.values():  # the first steps also compile oneDNN's kernels
        way(data.subset(torch.arange(10 * BATCH_SIZE).numpy()))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way(data)
            seconds[name].append(time.perf_counter() - start)
        took = "  ".join(f"{name} {times[-1]:6.2f} s" for name, times in seconds.items())
        print(f"turn {turn + 1}/{args.repeats}  {took}")
    print(f"2020/ours  {spread(seconds['2020'], seconds['ours'])}  (aim: at least 2.5)")
    print(f"ours/bare  {spread(seconds['ours'], seconds['bare'])}  (aim: at most 1.15)")

    difference = largest_difference(data)
    print(f"same mathematics: losses differ by {difference:.1e} at most (tolerance {TOLERANCE})")
    if not difference <= TOLERANCE:
        sys.exit("local_epoch.py: the two ways do not compute the same")


def some_images(data_dir: str, images: int) -> utils.ImageSet:
    """Return `images` training images of `data_dir` (or all, if they are fewer), shuffled."""
    data = utils.load_data(data_dir, "train")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data.subset(order[:images].numpy())


def epoch_of_2020(data: utils.ImageSet) -> None:
    ancestor.train(ancestor.same_net(), ancestor.loader(data, BATCH_SIZE))


def our_epoch(data: utils.ImageSet) -> None:
    net = utils.build_model("Net")
    utils.train(net, utils.TrainLoader(data, BATCH_SIZE), Settings(utils.LR, 0.0), log=silent)


def bare_steps(data: utils.ImageSet) -> None:
    net = utils.build_model("Net").train()
    images, labels = next(iter(utils.TrainLoader(data, BATCH_SIZE)))
    optimizer = utils.SGD(net.parameters(), momentum=0.9)
    for _ in range(len(data) // BATCH_SIZE):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step(utils.LR)


def silent(line: str) -> None:
    """Print nothing."""


def spread(over: Sequence[float], under: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return f"min {min(ratios):.2f}  median {statistics.median(ratios):.2f}  max {max(ratios):.2f}"


def largest_difference(data: utils.ImageSet, steps: int = 100) -> float:
    """Return by how much the losses of the two ways differ, over the first `steps` batches."""
    data = data.subset(torch.arange(min(len(data), steps * BATCH_SIZE)).numpy())
    numbered = dataclasses.replace(data, labels=torch.arange(len(data)))
    order = torch.cat([i for _, i in utils.TrainLoader(numbered, BATCH_SIZE, seed=1, flip=False)])
    labels = data.labels[order].split(BATCH_SIZE)

    def losses(net: nn.Module, run: Callable[[nn.Module], object]) -> Tensor:
        scores: list[Tensor] = []
        with net.register_forward_hook(lambda _net, _images, out: scores.append(out.detach())):
            run(net)
        return torch.stack([F.cross_entropy(*pair) for pair in zip(scores, labels, strict=True)])

    loader = ancestor.loader(data, BATCH_SIZE, order.tolist())
    theirs = losses(
        ancestor.same_net(), lambda net: ancestor.train(net, loader, lr=PROOF_LR, nesterov=True)
    )
    trainloader = utils.TrainLoader(data, BATCH_SIZE, seed=1, flip=False)
    settings = Settings(PROOF_LR, PROOF_LR)
    ours = losses(
        utils.build_model("Net"), lambda net: utils.train(net, trainloader, settings, log=silent)
    )
    return float((ours - theirs).abs().max())


if __name__ == "__main__":
    main()
