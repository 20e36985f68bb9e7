"""A trained model as an ONNX file, for devices without torch.

python server.py export runs/<run>
"""

import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import utils
from federated.errors import FederationError
from plumbing import cli
from plumbing.checkpoints import load_fitting
from plumbing.files import write_whole
from plumbing.photos import labelled, set_apart, views
from plumbing.runs import load_config

OPSET = 17  # onnxruntime 1.14 and newer


class _Pixels(torch.nn.Module):
    """A model that takes pixels as they are in a photograph, 0 to 255."""

    def __init__(self, net: torch.nn.Module, features: bool) -> None:
        super().__init__()
        self.net, self.features = net, features
        self.mean, self.std = (
            torch.tensor(getattr(net, name, default)).view(1, 3, 1, 1)
            for name, default in (("mean", utils.MEAN), ("std", utils.STD))
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images = (pixels.float() / 255 - self.mean) / self.std
        net: Any = self.net
        return net.features(images) if self.features else net(images)


def to_onnx(net: torch.nn.Module, image_size: int, features: bool = False) -> bytes:
    """Return an ONNX file: uint8 `pixels` (N, 3, H, W) in, float32 `scores` or `features` out."""
    pixels = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    output = "features" if features else "scores"
    file: Any = io.BytesIO()
    with warnings.catch_warnings():
        # The newer exporter needs onnxscript, 20 s, and imports half of torch for the same file.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Pixels(net, features).cpu().eval(),
            (pixels,),
            file,
            input_names=["pixels"],
            output_names=[output],
            dynamic_axes={"pixels": {0: "n"}, output: {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )
    return file.getvalue()


# --- python server.py export ----------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """How an exported file does beside torch, on the same test images."""

    file: Path
    accuracy: float
    torch_accuracy: float
    same: int  # images that both put into the same class
    images: int

    def __str__(self) -> str:
        size = self.file.stat().st_size / 1e6
        lost = 100 * (self.torch_accuracy - self.accuracy)
        return (
            f"{self.file}: {size:.1f} MB, {100 * self.accuracy:.1f} % ({lost:+.1f} points lost), "
            f"the class of torch on {self.same} of {self.images} images"
        )


def export(
    net: torch.nn.Module,
    image_size: int,
    folder: Path,
    calibration: np.ndarray,
    tests: np.ndarray,
    labels: np.ndarray,
) -> list[Compared]:
    """Write model.onnx and model.int8.onnx, and compare both with torch.

    Args:
        calibration: pixels (N, 3, H, W) that judge nothing; they set the scales of int8.
        tests, labels: what judges.
    """
    exact, small = folder / "model.onnx", folder / "model.int8.onnx"
    write_whole(exact, to_onnx(net, image_size))
    quantise(exact, small, calibration)
    with torch.inference_mode():
        images = (utils.normalise(torch.from_numpy(p[None]), net) for p in tests)
        wanted = np.array([int(net.cpu().eval()(image).argmax(1)) for image in images])
    compared = []
    for file in (exact, small):
        found = classes_of(file, tests)
        hits = float((found == labels).mean())
        torchs, same = float((wanted == labels).mean()), int((found == wanted).sum())
        compared.append(Compared(file, hits, torchs, same, len(labels)))
    return compared


def classes_of(file: Path, pixels: np.ndarray) -> np.ndarray:
    """Return the class that an ONNX file gives to each image."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return np.array([session.run(None, {"pixels": one[None]})[0].argmax() for one in pixels])


def quantise(source: Path, target: Path, calibration: np.ndarray) -> None:
    """Write an int8 file: weights by channel, activations by what `calibration` reaches."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            one = next(self.left, None)
            return None if one is None else {"pixels": one[None]}

    onnxruntime.set_default_logger_severity(3)  # else it names each constant that it removes
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises a step that changes nothing here
    try:
        quantize_static(
            str(source),
            str(target),
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.root.setLevel(level)


CALIBRATION_IMAGES = 200


def main(argv: Sequence[str]) -> None:
    """Export a finished run: python server.py export runs/<run>."""
    parser = cli.Parser(prog="server.py export", description=main.__doc__)
    parser.add_argument("run", metavar="RUN", help="the run's directory")
    parser.flag("calibration", "images that set int8's scales, train/<class>/*", metavar="DIR")
    args = parser.parse_args(argv)
    with cli.ready("server.py"):
        run = Path(args.run).expanduser()
        config = load_config(run, {"model": "", "data_dir": "", "classes": []})
        for compared in export_run(run, config, args.calibration):
            print(compared)


def export_run(run: Path, config: Mapping[str, Any], calibration: str | None) -> list[Compared]:
    """Export a run's model.safetensors.

    Raises:
        FederationError: there is none, or there are no images to compare or calibrate with.
    """
    model, size = config["model"], utils.image_size(config["model"])
    net = utils.build_model(model, len(config["classes"]))
    like = {name: value.numpy() for name, value in net.state_dict().items()}
    arrays, _ = load_fitting(run / "model.safetensors", like, model)
    net.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    data_dir, classes = Path(config["data_dir"]), config["classes"]
    if (data_dir / "test").is_dir() or (data_dir / "train").is_dir():
        rest, apart = set_apart(labelled(data_dir / "train", classes))
        tests = labelled(data_dir / "test", classes) or apart
        others = labelled(Path(calibration) / "train", classes) if calibration else rest
        if not tests or not others:
            raise FederationError(
                f"'{data_dir}' has no images to calibrate or compare with; name some that judge "
                "nothing by --calibration"
            )
        pixels, judged = (
            np.stack([views(photo.path, size, 1)[0] for photo in photos])
            for photos in (others[:: max(1, len(others) // CALIBRATION_IMAGES)], tests)
        )
        labels = np.array([photo.label for photo in tests])
    else:
        trains, test = (utils.load_data(config["data_dir"], p, size) for p in ("train", "test"))
        pixels = trains.images[:CALIBRATION_IMAGES].contiguous().numpy()
        judged, labels = test.images.contiguous().numpy(), test.labels.numpy()
    return export(net, size, run, pixels, judged, labels)
