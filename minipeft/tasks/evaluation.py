"""What every evaluation shares: batches of all examples, computing without gradients, and results in the given order.

    def logits(batch):
        return model(**batch.arguments()).float().cpu()

    rows = predictions(model, logits, ids, labels, device, precision)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from minipeft.data.batches import Batch, in_order_of_length
from minipeft.training import distributed as parallel
from minipeft.training.hardware import computing_in, out_of_memory, ran_out_of_memory
from minipeft.training.progress import progress_bar
from minipeft.training.sharding import is_sharded

logger = logging.getLogger(__name__)

# Texts per forward pass: on a CPU as many as fit its cache, on a GPU enough to keep it busy.
EVALUATION_BATCH_SIZE = {"cpu": 16, "cuda": 128}


def predictions(model: nn.Module, compute: Callable[[Batch], Iterable[Any]], ids: Sequence[np.ndarray],
                labels: Sequence[Any], device: torch.device, precision: torch.dtype, batch_size: int | None = None,
                progress: str | None = None) -> list[Any]:
    """What `compute` finds for each of the examples, in their order and from all processes.

    A batch that does not fit into the memory is computed in parts of half as many rows, as are all that follow it.

    Args:
        compute: batch -> a result for each of its rows; tensors lie on the CPU. It may be called again for some rows.
        ids, labels, batch_size, progress: as `evaluation_batches` has them.

    Raises:
        HardwareError: a single row does not fit. Of a sharded model, a batch: its processes compute in step.
    """
    found: list[tuple[int, Any]] = []
    most = len(ids)
    in_step = any(map(is_sharded, model.parameters()))
    with predicting(model, device, precision):
        for numbers, batch in evaluation_batches(ids, labels, device, batch_size, progress):
            results, most = _computed(compute, batch, device, most, in_step)
            found += zip(numbers, results)
    return gather(found, len(ids))


def _computed(compute: Callable[[Batch], Iterable[Any]], batch: Batch, device: torch.device, most: int,
              in_step: bool) -> tuple[list[Any], int]:
    """`compute`'s results of a batch, of at most `most` rows at once; and of how many at once in the end.

    Raises:
        HardwareError: it does not fit, and cannot be halved.
    """
    rows, length = batch.attention_mask.shape
    while True:
        try:
            return [result for part in batch.parts(-(-rows // most)) for result in compute(part)], most
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            most = min(most, rows)
            if most == 1 or in_step:
                raise out_of_memory(device, most, length) from error
        # Here the error is gone, and with it the tensors that its traceback held.
        if device.type == "cuda":
            torch.cuda.empty_cache()
        most //= 2
        logger.warning("%s is out of memory with %d texts of %d tokens at once: going on with %d", device.type,
                       2 * most, length, most)


@contextmanager
def predicting(model: nn.Module, device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """A block that computes predictions: in eval mode, without gradients, matrix products in `precision`.

    The model stays in eval mode afterwards. Do not `yield` inside of the block: whoever asks for the next item would
    then compute without gradients, too.
    """
    model.eval()
    with torch.inference_mode(), computing_in(precision, device):
        yield


def evaluation_batches(ids: Sequence[np.ndarray], labels: Sequence[Any], device: torch.device,
                       batch_size: int | None = None, progress: str | None = None) -> Iterator[tuple[list[int], Batch]]:
    """This process's share of the examples in batches of similar length, longest first.

    It changes no mode: with `predicting` its caller says how to compute.

    Args:
        ids: N arrays of token ids, (T,).
        labels: N labels, as `Batch` has them.
        device: where the batches go.
        batch_size: sequences per batch; default what suits the device.
        progress: title of a progress bar; None shows none.

    Yields:
        (numbers of the examples, their batch).
    """
    own = parallel.share_of(len(ids))
    batches = in_order_of_length([ids[i] for i in own], [labels[i] for i in own],
                                 batch_size or EVALUATION_BATCH_SIZE[device.type])
    with progress_bar(len(own), "text", progress) as bar:
        for rows, batch in batches:
            yield [own[row] for row in rows], batch.to(device)
            bar.update(len(rows))


def gather(found: Sequence[tuple[int, Any]], count: int) -> list[Any]:
    """The results of all `count` examples in the examples' order, from all processes.

    Args:
        found: (number of an example, its result) of this process's share, in any order; tensors lie on the CPU.
    """
    return parallel.gathered([result for _, result in found], [number for number, _ in found], count)


def bootstrap_interval(metric: Callable[[np.ndarray], float], examples: int, samples: int = 1000,
                       seed: int = 0) -> list[float]:
    """A 95 % interval of a metric on a whole test split, by the bootstrap (Efron 1979).

    A sample is as many examples as there are, drawn with replacement; the interval holds 95 % of the samples' metrics.

    Args:
        metric: numbers of examples, (N,) -> their metric.

    Returns:
        [2.5th percentile, 97.5th percentile].
    """
    rng = np.random.default_rng(seed)
    drawn = [metric(rng.integers(0, examples, examples)) for _ in range(samples)]
    return [round(float(bound), 6) for bound in np.percentile(drawn, (2.5, 97.5))]
