"""A trained model as an ONNX file, for devices without torch.

python server.py export runs/<run>
"""

import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import utils
from federated.errors import FederationError
from plumbing import cli
from plumbing.checkpoints import load_fitting
from plumbing.files import write_whole
from plumbing.photos import Photo, labelled, set_apart, views
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
        calibration: pixels (N, 3, H, W) that judge nothing; they set the scales of int8. Without
            any there is no int8 file.
        tests, labels: what judges.
    """
    exact, small = folder / "model.onnx", folder / "model.int8.onnx"
    write_whole(exact, to_onnx(net, image_size))
    if len(calibration):
        quantise(exact, small, calibration)
    with torch.inference_mode():
        images = (utils.normalise(torch.from_numpy(p[None]), net) for p in tests)
        wanted = np.array([int(net.cpu().eval()(image).argmax(1)) for image in images])
    compared = []
    for file in (exact, small) if len(calibration) else (exact,):
        found = classes_of(file, tests)
        hits = float((found == labels).mean())
        torchs, same = float((wanted == labels).mean()), int((found == wanted).sum())
        compared.append(Compared(file, hits, torchs, same, len(labels)))
    return compared


def classes_of(file: Path, pixels: np.ndarray) -> np.ndarray:
    """Return the class that an ONNX file gives to each image."""
    return scores_of(file, pixels).argmax(1)


def scores_of(file: Path, pixels: np.ndarray) -> np.ndarray:
    """Return the scores (N, classes) that an ONNX file gives, one image at a time."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"pixels": one[None]})[0] for one in pixels])


def quantise(source: Path, target: Path, calibration: np.ndarray) -> None:
    """Write an int8 file: weights by channel, activations by what `calibration` reaches.

    What rounding shifts the scores by, on average over `calibration`, is taken back (the bias
    correction of Nagel et al. 2019, arXiv:1906.04721, at the output alone). Of EffLite0Small's
    classes on 409 photographs that had trained and calibrated nothing, 93.9 % then agree with
    float32, 93.2 % without it. Percentiles or entropy, symmetric activations, 8 bits unsigned for
    weights, or a head in float32 change that by -0.5 to +1 points; a stem or a depthwise layer in
    float32 makes it worse, because its ReLU6 is then no longer part of the rounding.
    """
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
    _shift_scores(target, (scores_of(source, calibration) - scores_of(target, calibration)).mean(0))


def _shift_scores(file: Path, shift: np.ndarray) -> None:
    """Add something to the scores of an ONNX file."""
    import onnx

    model = onnx.load(str(file))
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["unshifted" if name == output else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(shift, "shift"))
    model.graph.node.append(onnx.helper.make_node("Add", ["unshifted", "shift"], [output]))
    write_whole(file, model.SerializeToString())


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
        return export_photos(net, size, run, others, tests)
    trains, test = (utils.load_data(config["data_dir"], p, size) for p in ("train", "test"))
    pixels = trains.images[:CALIBRATION_IMAGES].contiguous().numpy()
    judged, labels = test.images.contiguous().numpy(), test.labels.numpy()
    return export(net, size, run, pixels, judged, labels)


def export_photos(
    net: torch.nn.Module, size: int, folder: Path, others: Sequence[Photo], tests: Sequence[Photo]
) -> list[Compared]:
    """Do as `export`, with some of `others` to calibrate and all of `tests` to compare."""

    def pixels_of(photos: Sequence[Photo]) -> np.ndarray:
        return np.stack([views(photo.path, size, 1)[0] for photo in photos])

    few = others[:: -(-len(others) // CALIBRATION_IMAGES) or 1]
    calibration = pixels_of(few) if few else np.empty(0, np.uint8)
    labels = np.array([photo.label for photo in tests])
    return export(net, size, folder, calibration, pixels_of(tests), labels)


def export_at_end(
    net: torch.nn.Module, size: int, folder: Path, others: Sequence[Photo], tests: Sequence[Photo]
) -> str:
    """Export a model at the end of its run; return one line on it, also where that fails."""
    command = f"python server.py export {folder}"
    if missing := [name for name in ("onnx", "onnxruntime") if not find_spec(name)]:
        return f"no model.onnx: {missing[0]} is not installed; later: {command}"
    try:
        exact, *small = export_photos(net, size, folder, others, tests)
    except Exception as error:  # the run is over and its model saved: nothing may break it now
        return f"no model.onnx: {error}; later: {command}"
    text = f"{exact.file}, torch's class on {exact.same} of {exact.images} test images"
    if not small:
        return f"{text}; for int8, too: {command} --calibration DIR"
    lost = 100 * (small[0].torch_accuracy - small[0].accuracy)
    return f"{text}; {small[0].file.name}, {lost:+.1f} points lost"
