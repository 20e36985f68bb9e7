"""What the servers of both roads share, for the models and data of utils.py.

server.py runs it over the stream, flower_app.py over Flower's engine: the model and its test
images, where a run begins, the rounds, and what it leaves on the disk.
"""

import argparse
import contextlib
import importlib.util
import json
import platform
import secrets
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import flwr
import numpy as np
import torch

import utils
from federated.errors import FederationError
from federated.rounds import (
    EQUAL_EXAMPLES,
    Fleet,
    Notice,
    Observed,
    Observer,
    Plan,
    Started,
    Step,
    synchronous,
)
from federated.settings import OPEN_ENDED, RunSettings
from federated.strategies import Strategy, make_strategy, state_of_version_1
from federated.updates import Bounds, Update, Weights, fingerprint, make_update
from plumbing import cli
from plumbing.checkpoints import choose_fitting, load_checkpoint, load_fitting
from plumbing.photos import Photo
from plumbing.picture import draw_report
from plumbing.publish import PUBLISHED, Publication
from plumbing.report import Console, print_classes, shortened, step_record
from plumbing.runs import RunDirectory, new_run_name, provenance
from plumbing.tensorboard import TensorBoard
from plumbing.threads import Threads
from torch_export import export_at_end
from torch_heads import FROZEN, HeadTest, Publisher, ServiceTrainer, make_card, own_photos
from torch_trainer import TorchTrainer, code_of, find_model, has_head, source_hash

ROOT = Path(__file__).resolve().parent
MAX_OWN_WEIGHT = 1000.0
NEW_ROUNDS = 20  # of a service without an end, in which it learns what is new on a device
TORCHVISION = "torchvision:"
UPDATE_COPIES = 5  # at most, of a device's update in memory while Flower's strategies aggregate


# --- The model and its test -----------------------------------------------------------


class Task:
    """The model that is trained, and the images that test it."""

    def __init__(
        self, settings: RunSettings, data_dir: str | None, threads: Threads | None = None
    ) -> None:
        find_model(settings.model)
        self.model = settings.model
        self.source = source_hash(settings.model)
        self.data_dir = data_dir or ROOT / "data"
        self.testset: utils.ImageSet | HeadTest
        self.validation_set: utils.ImageSet | None = None
        self.torch_device = "cuda" if torch.cuda.is_available() else "cpu"
        self.threads = threads or Threads(str(torch.get_num_threads()))
        if has_head(settings.model):
            self._test_head(settings)
            return
        size = utils.image_size(settings.model)
        images = utils.load_data(self.data_dir, "test", size, download=data_dir is None)
        if held_out := round(len(images) * settings.validation):
            order = np.random.default_rng(settings.seed).permutation(len(images))
            self.validation_set = images.subset(np.sort(order[:held_out]))
            images = images.subset(np.sort(order[held_out:]))
        self.testset = images
        self._build(settings)

    def _test_head(self, settings: RunSettings) -> None:
        if settings.validation:
            raise FederationError("--validation is not for a model with a frozen backbone")
        self.testset = HeadTest(self.data_dir)
        self._build(settings)

    def load(self, source: str, new_head: bool = False) -> None:
        """Start from a file; of the model's arrays only those that it has may be missing there.

        Args:
            source: the file, or torchvision:NAME for its published weights, by the Internet.
            new_head: take what fits, and leave the rest at its random start.
        """
        state = {name: value.cpu().numpy() for name, value in self.net.state_dict().items()}
        own = utils.get_weights(self.net)
        if source.startswith(TORCHVISION):
            found = published_weights(source.removeprefix(TORCHVISION))
            like = state
            fits, left_out = choose_fitting(source, found, like, self.model, new_head)
        else:
            path = Path(source).expanduser()
            like = {n: a for n, a in state.items() if path.name != FROZEN or n not in own}
            fits, left_out = load_fitting(path, like, self.model, new_head)
        self.net.load_state_dict({n: torch.tensor(a) for n, a in fits.items()}, strict=False)
        if left_out:
            print(f"of {source} these do not fit and are left out: {', '.join(left_out)}")
        if missing := [name for name in like if name not in fits]:
            print(f"these start at random: {', '.join(missing)}")

    def _build(self, settings: RunSettings) -> None:
        self.net = utils.build_model(settings.model, len(self.testset.classes), settings.seed)
        self.form = fingerprint(utils.get_weights(self.net))

    @property
    def images(self) -> str:
        return f"{len(self.testset):,} {self.testset.source}"

    def objection_to(self, properties: Mapping[str, Any]) -> str | None:
        """Return why a device that reports this of itself must not take part, or None."""
        if properties.get("model") != self.model:
            return (
                f"it was started with --model {properties.get('model')}, the server with "
                f"--model {self.model}; start both with the same"
            )
        if properties.get("classes") != json.dumps(self.testset.classes):
            return (
                f"its classes are {shortened(properties.get('classes'))}, the server's are "
                f"{shortened(json.dumps(self.testset.classes))}; give both the same class folders"
            )
        if properties.get("weights", self.form) != self.form:
            return (
                f"its {self.model} has {shortened(properties['weights'])}, the server's "
                f"{self.form}; give both the same utils.py"
            )
        problem = properties.get("problem")
        return None if problem is None else str(problem)

    def evaluate(self, weights: Weights) -> dict[str, Any]:
        """Return loss and accuracy on the test images, overall and by class."""
        utils.set_weights(self.net, weights)
        if isinstance(self.testset, HeadTest):
            result = self.testset.evaluate(self.net, self.torch_device)
        else:
            result = self._test(self.testset)
        classes = self.testset.classes
        validation = {}
        if self.validation_set:
            held_out = utils.test(self.net, self.validation_set, self.torch_device)
            validation = {
                "validation_loss": held_out.loss,
                "validation_accuracy": held_out.accuracy,
            }
        return {
            **validation,
            "loss": result.loss,
            "accuracy": result.accuracy,
            "class_loss": dict(zip(classes, result.class_loss, strict=True)),
            "class_accuracy": dict(zip(classes, result.class_accuracy, strict=True)),
            "test_images": f"{len(self.testset)} {self.testset.source}",
        }

    def _test(self, testset: utils.ImageSet) -> utils.Evaluation:
        """Evaluate with the number of threads that is the fastest."""

        def trial(seconds: float) -> float:
            few = testset.subset(np.arange(min(100, len(testset))))
            began, times = time.perf_counter(), 0
            while (spent := time.perf_counter() - began) < seconds or not times:
                utils.test(self.net, few)
                times += 1
            return times * len(few) / spent

        if self.torch_device != "cpu":
            return utils.test(self.net, testset, self.torch_device)
        if self.threads.auto and not self.threads.count:
            self.threads.choose(trial)
        began = time.perf_counter()
        result = utils.test(self.net, testset)
        if change := self.threads.watch(len(testset), time.perf_counter() - began, trial):
            print(f"evaluation: {change}")
        return result


def published_weights(name: str) -> dict[str, np.ndarray]:
    """Return the newest weights that torchvision publishes for one of its models.

    Raises:
        FederationError: it has no such model, or they cannot be downloaded.
    """
    from torchvision.models import get_model_weights

    try:
        weights = get_model_weights(name).DEFAULT
    except ValueError:
        raise FederationError(
            f"torchvision has no model '{name}' with weights; its documentation lists them"
        ) from None
    try:
        state = torch.hub.load_state_dict_from_url(
            weights.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # of a file that holds no weights: torch lists no types
        raise FederationError(f"cannot get {weights.url}: {error}") from None
    return {name: value.numpy() for name, value in state.items()}


def open_start(
    settings: RunSettings, args: argparse.Namespace, task: Task, strategy: Strategy, bounds: Bounds
) -> tuple[Weights, int | None]:
    """Return the first weights, and the last finished round; None for a new run.

    The weights are random, from a file, or of the run that is resumed.
    """
    weights = utils.get_weights(task.net)
    run_frozen = Path(args.run_dir or "", PUBLISHED, FROZEN)
    if args.resume is not None and run_frozen.exists():
        task.load(str(run_frozen))
    if args.resume is not None:
        finished_round, weights, state, memory = load_checkpoint(
            Path(args.run_dir), weights, settings.model
        )
        if memory is None:  # of an older release
            memory = {"strategy": state_of_version_1(state, list(weights))}
        strategy.load_state(state, memory.get("strategy", {}))
        bounds.restore(memory.get("bounds", {}))
        if task.threads.auto and memory.get("threads"):
            task.threads.set(memory["threads"])
        return weights, finished_round
    if args.init_weights:
        task.load(args.init_weights, args.new_head)
        return utils.get_weights(task.net), None
    return weights, None


# --- The story ------------------------------------------------------------------------


def make_plan(
    settings: RunSettings,
    run_id: str,
    finished_round: int | None,
    task: Task,
    own: Callable[[int, Weights], tuple[Update, int]] | None = None,
    every: float = 0.0,
) -> Plan:
    """Return what a round needs to know of the settings."""

    def job_id(server_round: int) -> str:
        """Return a name that no round of another run, or with other settings, has."""
        how = repr((settings.strategy, settings.for_round(server_round)))
        return f"{run_id}-{zlib.crc32(how.encode()):08x}-{server_round}"

    return Plan(
        rounds=settings.rounds,
        config=lambda server_round: {
            **settings.for_round(server_round).to_config(),
            "run_id": run_id,
        },
        evaluate=task.evaluate,
        job_id=job_id,
        first_round=(finished_round or 0) + 1,
        min_num_clients=settings.min_num_clients,
        min_sample_size=settings.sample_size,
        min_replies=settings.min_replies,
        timeout=settings.round_timeout or None,
        retries=settings.round_retries,
        seed=settings.seed,
        own=own,
        equal=settings.weighting == "equal",
        new_rounds=NEW_ROUNDS if settings.rounds == OPEN_ENDED else 0,
        every=every,
        open_ended=settings.rounds == OPEN_ENDED,
    )


def open_run(
    settings: RunSettings,
    args: argparse.Namespace,
    task: Task,
    finished_round: int | None,
    run_id: str,
) -> RunDirectory:
    """Return the directory of this run, with its settings written."""
    default = ROOT / "runs" / new_run_name(settings.model)
    config = {
        **asdict(settings),
        **vars(args),
        "data_dir": str(task.data_dir),
        "run_id": run_id,
        "test_images": f"{len(task.testset)} {task.testset.source}",
        "classes": task.testset.classes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flwr": flwr.__version__,
        **provenance(ROOT),
        "source_sha256": task.source,
    }
    path = Path(args.run_dir).expanduser() if args.run_dir else default
    return RunDirectory(path, config, finished_round, take_free_name=not args.run_dir)


def open_strategy(settings: RunSettings) -> Strategy:
    """Return Flower's strategy, or the user's own, with the settings of this run."""
    return make_strategy(
        settings.strategy,
        settings.sample_fraction,
        settings.sample_size,
        settings.lr,
        settings.sample_fraction_evaluate,
    )


def run(
    settings: RunSettings,
    args: argparse.Namespace,
    open_fleet: Callable[[Task, int], Fleet],
    last_call: Callable[[Fleet, RunDirectory, Observer], None] = lambda *_: None,
    open_observers: Callable[[Fleet, RunDirectory], Sequence[Observer]] = lambda *_: (),
    program: str = "server.py",
    resume_command: str = "python server.py --resume {}",
) -> None:
    """Train round by round, and save.

    Args:
        args: data_dir, run_dir, init_weights, resume, run_id; all of it is noted in config.json.
        open_fleet: takes the model's bytes, returns the devices.
        last_call: what to do about devices when no round is left to do.
        open_observers: returns observers beside those that are always there.
        program, resume_command: printed, with the directory's name, when it is interrupted.
    """
    strategy = open_strategy(settings)
    task = Task(settings, args.data_dir, Threads(args.threads))
    bounds = Bounds(settings.max_update_norm, settings.max_weight_ratio)
    weights, finished_round = open_start(settings, args, task, strategy, bounds)
    own = open_own_data(settings, task, args.own_data, strategy)
    model_bytes = sum(array.nbytes for array in weights.values())
    if not strategy.needs_only_mean:
        size = UPDATE_COPIES * model_bytes / 1e6
        print(f"{settings.strategy} needs all updates at once: about {size:,.1f} MB a device")
    run_id = args.run_id or secrets.token_hex(8)
    directory = open_run(settings, args, task, finished_round, run_id)
    fleet, run_is_over = None, False
    try:
        fleet = open_fleet(task, model_bytes)
        publisher = open_publisher(task, settings, args, directory, fleet)
        console = Console(
            fleet.address, settings.rounds, task.testset.source, task.source, code_of(task.model)
        )
        observers: Sequence[Observer] = (
            console,
            directory.observe,
            TensorBoard(directory.path),
            *open_observers(fleet, directory),
        )

        def observe(event: Observed | Step) -> None:
            for observer in observers:
                observer(event)

        evaluation = None
        if finished_round is None:
            directory.save(0, weights)
            observe(Started(task.evaluate(weights)))  # while the devices join
        else:
            print(f"resuming {directory} after round {finished_round}")
        if publisher:
            publisher.begin(weights)
        plan = make_plan(settings, run_id, finished_round, task, own, args.every)
        for step in synchronous(fleet, strategy, weights, plan, bounds, observe):
            weights, evaluation = step.weights, step.evaluation
            observe(step)
            save_round(directory, settings, task, strategy, bounds, step)
            if publisher and (problem := publisher.offer(weights)):
                observe(Notice(f"round {step.server_round} is not handed out: {problem}"))
        if evaluation is None:
            evaluation = task.evaluate(weights)
            print(f"all rounds are done; for more of them: --rounds {settings.rounds + 3}")
            last_call(fleet, directory, observe)
        run_is_over = True
    except BaseException as error:
        what = "stopped" if isinstance(error, Exception) else "interrupted"
        print_how_to_resume(directory, f"{program}: {what}", resume_command)
        raise
    finally:
        cli.end_at_next_signal()
        if fleet:
            fleet.close(run_is_over)
    print_results(settings, task, directory, weights, evaluation)
    export_model(task, directory, args.own_data)


def export_model(task: Task, directory: RunDirectory, own_data: str | None) -> None:
    """Write a model with a head as ONNX files, calibrated on what the server has to train on."""
    if not isinstance(task.testset, HeadTest):
        return
    folder = Path(own_data.rpartition(":")[0] if own_data else task.data_dir).expanduser()
    others: list[Photo] = []
    with contextlib.suppress(FederationError):  # it has none
        others = own_photos(folder, task.testset.classes)
    size = utils.image_size(task.model)
    print(export_at_end(task.net, size, directory.path, others, task.testset.photos))


def open_publisher(
    task: Task,
    settings: RunSettings,
    args: argparse.Namespace,
    directory: RunDirectory,
    fleet: Fleet,
) -> Publisher | None:
    """Return what hands out each new model, for a model of which only the head learns."""
    if not isinstance(task.testset, HeadTest):
        return None
    publication = Publication(directory.path / PUBLISHED, fleet.sign)
    fleet.publication = publication
    card = make_card(settings, task.net, task.testset.classes)
    judge = HeadTest(args.gate_data) if args.gate_data else task.testset
    strict = bool(args.gate_data or args.open_ended)
    return Publisher(card, task.net, publication, judge, task.torch_device, strict)


def open_own_data(
    settings: RunSettings, task: Task, own_data: str | None, strategy: Strategy
) -> Callable[[int, Weights], tuple[Update, int]] | None:
    """Return what trains in each round on the server's own photographs, for --own_data."""
    if not own_data:
        return None
    if not strategy.needs_only_mean:
        raise FederationError(f"--own_data needs a strategy of means, not {settings.strategy}")
    folder, _, number = own_data.rpartition(":")
    try:
        weight = float(number)
        if not (folder and 0 < weight <= MAX_OWN_WEIGHT):
            raise ValueError
    except ValueError:
        raise FederationError(f"--own_data {own_data} is not DIR:WEIGHT, as in service:2") from None
    trainer: TorchTrainer | ServiceTrainer
    if isinstance(task.testset, HeadTest):
        classes = task.testset.classes
        photos = own_photos(Path(folder).expanduser(), classes)
        trainer = ServiceTrainer(make_card(settings, task.net, classes), task.net, photos)
    else:
        trainer = TorchTrainer("service", settings.model, folder, task.torch_device)

    def train(server_round: int, weights: Weights) -> tuple[Update, int]:
        how = replace(settings.for_round(server_round), partition="none")
        trained, count, metrics = trainer.fit(weights, how)
        update = make_update(trained.values(), weights, count, metrics)
        counted = EQUAL_EXAMPLES if settings.weighting == "equal" else count
        return update, max(1, round(weight * counted))

    return train


def save_round(
    directory: RunDirectory,
    settings: RunSettings,
    task: Task,
    strategy: Strategy,
    bounds: Bounds,
    step: Step,
) -> None:
    """Write what a finished round leaves on the disk."""
    arrays, rest = strategy.state()
    row = {
        "server_round": step.server_round,
        **step.evaluation,
        "lr": settings.for_round(step.server_round).lr,
        **step_record(step),
    }
    memory = {"strategy": rest, "bounds": bounds.state(), "threads": task.threads.count}
    directory.save(step.server_round, step.weights, arrays, row, memory)
    if settings.validation:
        directory.keep_best()


def print_how_to_resume(directory: RunDirectory, what: str, command: str) -> None:
    """Print the command that continues a run, unless there is nothing to continue."""
    hint = (
        "No round was finished: its directory is removed"
        if directory.abandon()
        else f"To continue after round {directory.saved_round}: "
        + command.format(shlex.quote(str(directory)))
    )
    # One write, which the fleet's thread cannot print into.
    print(f"{what}; devices wait. {hint}\n", end="", file=sys.stderr)


def print_results(
    settings: RunSettings,
    task: Task,
    directory: RunDirectory,
    weights: Weights,
    evaluation: Mapping[str, Any],
) -> None:
    """Print and save how good the model is."""
    print_classes(evaluation)
    print(f"\ntest accuracy {100 * evaluation['accuracy']:.1f} % on {task.images}")
    utils.set_weights(task.net, weights)
    directory.finish({n: v.cpu().numpy() for n, v in task.net.state_dict().items()})
    title = f"{settings.model}, {settings.strategy}, tested on {task.images}"
    curves = "no report.png, for which matplotlib is not installed"
    if importlib.util.find_spec("matplotlib"):  # a SuperLink's image has none
        start = directory.start_accuracy()
        draw_report(directory.path / "report.png", title, directory.rounds(), start)
        curves = f"curves in {directory}/report.png"
    print(f"model in {directory}/model.safetensors, {curves}")
