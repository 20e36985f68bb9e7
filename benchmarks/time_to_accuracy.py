"""How many seconds of local training it takes to reach 50 % test accuracy, then and now.

    python benchmarks/time_to_accuracy.py --data_dir data

    2020   Net from PyTorch's own first weights, PIL images through a DataLoader, SGD at 0.001
           with momentum 0.9, for as long as it takes (benchmarks/ancestor.py)
    Net    utils.TrainLoader and utils.train at their defaults; the learning rate falls to 0
           over STEPS steps, chosen by trials on the same test images and seeds 0 to 35
    PiNet  the same with the newer model

All train on the same images with batch 32, in turn, seed by seed.
Every --every steps (five times that while it is more than 3 points away) the clock stands
still while the whole test set is evaluated; the first time at the target or above it counts.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

import utils
from benchmarks import ancestor
from benchmarks.local_epoch import BATCH_SIZE, silent, some_images, spread
from federated.errors import FederationError
from federated.settings import Settings

STEPS = {"Net": 1000, "PiNet": 600}  # over which the learning rate falls to 0


class Clock:
    """Counts the seconds of training; between two steps it stops to evaluate.

    It ends a training, utils.train's or the ancestor's, by returning 1.0 at the target.
    """

    def __init__(self, net: nn.Module, test_data: utils.ImageSet, target: float, every: int):
        self.net, self.test_data, self.target, self.every = net, test_data, target, every
        self.seconds, self.accuracy, self.steps = 0.0, 0.0, 0
        self.next_look = 5 * every
        self.resumed = time.perf_counter()

    def __call__(self, progress: object = None) -> float | None:
        if self.steps == self.next_look and self.evaluate():
            return 1.0
        self.steps += 1
        return None

    def evaluate(self) -> bool:
        """Return whether the target is reached."""
        self.seconds += time.perf_counter() - self.resumed
        self.accuracy = utils.test(self.net, self.test_data).accuracy
        far = self.accuracy < self.target - 0.03
        self.next_look += self.every * (5 if far else 1)
        self.net.train()
        self.resumed = time.perf_counter()
        return self.accuracy >= self.target


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds of training until a test accuracy")
    parser.add_argument(
        "--data_dir", "--data-dir", default="data", help="as for client.py (default: data)"
    )
    parser.add_argument("--images", type=int, default=50_000, help="an epoch (default: 50000)")
    parser.add_argument("--target", type=float, default=50.0, help="in %% (default: 50)")
    parser.add_argument("--limit", type=int, default=30, help="of 2020's, epochs (default: 30)")
    parser.add_argument("--every", type=int, default=10, help="steps (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: one per core)")
    parser.add_argument("--short", action="store_true", help="synthetic images, a target of 5 %%")
    args = parser.parse_args()
    if args.short:
        args.data_dir, args.images, args.target = "synthetic:2000", 2000, 5.0
        args.seeds, args.every = 1, 2
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        data = some_images(args.data_dir, args.images)
        test_data = utils.load_data(args.data_dir, "test")
    except FederationError as error:
        sys.exit(f"time_to_accuracy.py: {error}")
    print(f"{len(data):,} {data.source}, batch {BATCH_SIZE}, threads {torch.get_num_threads()}")

    def seconds(name: str, seed: int) -> float:
        """Train until the target; print and return how many seconds that took."""
        torch.manual_seed(seed)  # 2020 draws its first weights and shuffles by it
        classes = len(data.classes)
        net = ancestor.Net(classes) if name == "2020" else utils.build_model(name, classes, seed)
        images = min(len(data), STEPS.get(name, 0) * BATCH_SIZE)  # each of them once
        trainset = data.subset(torch.arange(images).numpy())
        clock = Clock(net, test_data, args.target / 100, args.every)
        if name == "2020":
            ancestor.train(net, ancestor.loader(data, BATCH_SIZE), args.limit, before_step=clock)
        else:
            trainloader = utils.TrainLoader(trainset, BATCH_SIZE, seed)
            utils.train(net, trainloader, Settings(utils.LR, 0.0), before_step=clock, log=silent)
        if clock.accuracy >= clock.target or clock.evaluate():
            print(
                f"seed {seed}  {name:5}  {clock.accuracy:.1%} after {clock.steps:6,} steps, "
                f"{clock.seconds:7.2f} s"
            )
            return clock.seconds
        sys.exit(
            f"time_to_accuracy.py: {name} is at {clock.accuracy:.1%} after {clock.steps:,} steps "
            f"and ends below {args.target} %; raise --limit or lower --target"
        )

    names = ("2020", *STEPS)
    runs = [[seconds(name, seed) for name in names] for seed in range(args.seeds)]
    took = dict(zip(names, zip(*runs, strict=True), strict=True))
    for name in STEPS:
        print(f"2020/{name:5}  {spread(took['2020'], took[name])}  (aim: 15)")


if __name__ == "__main__":
    main()
