"""A Trainer without torch: ONNX Runtime sees, NumPy trains the head. For a Pi Zero 2 W.

The numbers are those of torch's training (torch_trainer.py) to 1e-4.
"""

import contextlib
import ctypes
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from federated.settings import Settings
from head_trainer import Weights, head_scores, softmax

M_MMAP_THRESHOLD = -3  # of <malloc.h>


class OnnxBackbone:
    """A frozen backbone, uint8 pixels in and features out, as an ONNX file.

    Args:
        path: of a file that was checked against the hash in card.json.
        threads: more than one helps where other processes leave the cores alone.
    """

    device = "cpu"
    source = ""  # there is no utils.py here that could differ from the server's

    def __init__(self, path: Path, threads: int = 1) -> None:
        import onnxruntime

        _give_back_memory()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = False  # 30 MB less at its peak
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def features(self, pixels: np.ndarray) -> np.ndarray:
        # One view at a time: eight at once take 60 MB more, and no less time.
        return np.concatenate([self.session.run(None, {"pixels": one[None]})[0] for one in pixels])

    def train(
        self,
        weights: Mapping[str, np.ndarray],
        x: np.ndarray,
        labels: np.ndarray,
        order: list[list[np.ndarray]],
        settings: Settings,
    ) -> tuple[Weights, float, int]:
        return train_head(weights, x, labels, order, settings)


def _give_back_memory() -> None:
    """Let glibc map each larger array by itself, so that it goes back when it is freed.

    By default it learns to keep them, and a backbone's arrays of many sizes leave holes: 36 views
    of EffLite0 then take 194 MB at the peak and 12 ms each, with this 126 MB and 18 ms (x86-64).
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)


def train_head(
    weights: Mapping[str, np.ndarray],
    x: np.ndarray,
    labels: np.ndarray,
    order: list[list[np.ndarray]],
    settings: Settings,
) -> tuple[Weights, float, int]:
    """Train a linear head as utils.train does, by hand: Nesterov SGD on the cross-entropy.

    Returns:
        The weights, the mean loss of the last epoch, and how many steps were made.
    """
    received = [array.astype(np.float32) for array in weights.values()]
    trained = [array.copy() for array in received]
    velocities = [np.zeros_like(array) for array in received]
    steps, smooth = sum(map(len, order)), np.float32(settings.label_smoothing)
    step, total, began = 0, 0.0, time.perf_counter()
    for epoch in order:
        losses = []
        for batch in epoch:
            done = step / steps
            if settings.round_seconds:
                done = max(done, (time.perf_counter() - began) / settings.round_seconds)
            if step and done >= 1:
                break
            rows, wanted = x[batch], labels[batch]
            chosen = np.arange(len(batch)), wanted
            p = softmax(head_scores(dict(zip(weights, trained, strict=True)), rows))
            logs = np.log(np.maximum(p, 1e-30))
            losses.append(float(-((1 - smooth) * logs[chosen] + smooth * logs.mean(1)).mean()))
            p -= smooth / p.shape[1]
            p[chosen] -= 1 - smooth
            p /= len(batch)
            lr = np.float32(settings.lr + (settings.lr_end - settings.lr) * min(done, 1.0))
            pairs = zip(trained, velocities, (p.T @ rows, p.sum(0)), received, strict=True)
            for w, v, gradient, start in pairs:
                gradient += np.float32(settings.proximal_mu) * (w - start)
                gradient += np.float32(settings.weight_decay) * w
                v *= np.float32(settings.momentum)
                v += gradient
                w -= lr * (gradient + np.float32(settings.momentum) * v)
            step += 1
        total = float(np.mean(losses)) if losses else total
    return dict(zip(weights, trained, strict=True)), total, step
