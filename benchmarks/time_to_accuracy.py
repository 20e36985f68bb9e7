"""How many seconds of local training Net needs to reach 50 % test accuracy, then and now.

    python -m benchmarks.time_to_accuracy --data_dir data

    2020   PIL images through a DataLoader, SGD at 0.001 with momentum 0.9, for as long as it
           takes (benchmarks/ancestor.py)
    ours   utils.TrainLoader and utils.train at their defaults; the learning rate falls to 0
           over --horizon epochs, a number fixed before the run

Both train on the same images with batch 32, alternately, from the same weights for each seed.
Every --every steps the clock stands still while the whole test set is evaluated; the first
time at the target or above it counts.
"""

import argparse
import statistics
import sys
import time

import torch
from torch import nn

import utils
from benchmarks import ancestor
from benchmarks.local_epoch import BATCH_SIZE, silent, some_images, spread


class Reached(Exception):
    """The target accuracy is reached; ends a training from inside."""


class Clock:
    """Counts the seconds of training; a forward pre-hook that evaluates between two steps."""

    def __init__(self, test_data: utils.ImageSet, target: float, every: int) -> None:
        self.test_data, self.target, self.every = test_data, target, every
        self.seconds, self.accuracy, self.steps = 0.0, 0.0, 0
        self.resumed = time.perf_counter()

    def __call__(self, net: nn.Module, images: object) -> None:
        if not net.training:  # utils.test is calling
            return
        if self.steps and self.steps % self.every == 0:
            self.evaluate(net)
        self.steps += 1

    def evaluate(self, net: nn.Module) -> None:
        self.seconds += time.perf_counter() - self.resumed
        self.accuracy = utils.test(net, self.test_data).accuracy
        if self.accuracy >= self.target:
            raise Reached
        net.train()
        self.resumed = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds of training until a test accuracy")
    parser.add_argument(
        "--data_dir", "--data-dir", default="data", help="as for client.py (default: data)"
    )
    parser.add_argument("--images", type=int, default=25_000, help="an epoch (default: 25000)")
    parser.add_argument("--target", type=float, default=50.0, help="in %% (default: 50)")
    parser.add_argument("--horizon", type=int, default=2, help="of ours, epochs (default: 2)")
    parser.add_argument("--limit", type=int, default=60, help="of 2020's, epochs (default: 60)")
    parser.add_argument("--every", type=int, default=100, help="steps (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: one per core)")
    parser.add_argument("--short", action="store_true", help="synthetic images, a target of 20 %%")
    args = parser.parse_args()
    if args.short:
        args.data_dir, args.images, args.target = "synthetic:2000", 2000, 20.0
        args.horizon, args.seeds, args.every = 10, 1, 20
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        data = some_images(args.data_dir, args.images)
        test_data = utils.load_data(args.data_dir, "test")
    except utils.TaskError as error:
        sys.exit(f"time_to_accuracy.py: {error}")
    print(f"{len(data):,} {data.source}, batch {BATCH_SIZE}, threads {torch.get_num_threads()}")

    def seconds(name: str, seed: int) -> float:
        """Train until the target; print and return how many seconds that took."""
        torch.manual_seed(seed)  # the DataLoader shuffles by it
        net = utils.build_model("Net", len(data.classes), seed)
        clock = Clock(test_data, args.target / 100, args.every)
        net.register_forward_pre_hook(clock)
        try:
            if name == "2020":
                ancestor.train(net, ancestor.loader(data, BATCH_SIZE), args.limit)
            else:
                trainloader = utils.TrainLoader(data, BATCH_SIZE, seed)
                utils.train(net, trainloader, args.horizon, lr_end=0.0, log=silent)
            clock.evaluate(net)
        except Reached:
            print(
                f"seed {seed}  {name}  {clock.accuracy:.1%} after {clock.steps:6,} steps, "
                f"{clock.seconds:7.2f} s"
            )
            return clock.seconds
        sys.exit(
            f"time_to_accuracy.py: {name} is at {clock.accuracy:.1%} after {clock.steps:,} steps "
            f"and ends below {args.target} %; raise --horizon or --limit, or lower --target"
        )

    runs = [(seconds("2020", seed), seconds("ours", seed)) for seed in range(args.seeds)]
    then, now = zip(*runs, strict=True)
    print(f"seconds to {args.target} %: 2020 {statistics.median(then):.1f}", end="")
    print(f", ours {statistics.median(now):.1f} (medians)")
    print(f"2020/ours  {spread(then, now)}  (aim: at least 15)")


if __name__ == "__main__":
    main()
