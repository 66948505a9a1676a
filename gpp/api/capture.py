"""A module and an example batch to a captured model: checked, and in silence."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO

from torch import Tensor, nn
from torch._logging._internal import set_logs

from gpp.capture.capture import Captured
from gpp.capture.capture import capture as captured
from gpp.capture.export import EXAMPLES, CaptureError
from gpp.capture.verify import verify as verified
from gpp.program.autocast import Autocast
from gpp.runtime.environment import TRACEBACK


def capture(
    model: nn.Module,
    example_batch: Mapping[str, Tensor],
    *,
    autocast: Autocast | None = None,
    seed: int = 0,
    verify: bool = True,
) -> Captured:
    """Capture a module whose `forward` takes the batch's tensors by name: `Captured.graph` is to plan with.

    Of `example_batch` the first 4 samples are used: tensors of shape (samples, ...). `autocast` is that of a
    device, by whose rules the graph is then computed in bfloat16. `seed` is that of random operators. Unless
    the module is on the meta device its loss and gradients are compared with the graph's (`verify`). Raises
    CaptureError naming the module and the reason.
    """
    short = next((k for k, v in example_batch.items() if v.dim() == 0 or len(v) < EXAMPLES), None)
    if short is not None or not example_batch:
        raise CaptureError(
            f"the example batch needs at least {EXAMPLES} samples of every key, in dimension 0; "
            + (f"{short!r} has the shape {tuple(example_batch[short].shape)}" if short else "it has no key")
        )
    parameters = list(model.parameters())
    if not parameters:
        raise CaptureError(f"{type(model).__name__} has no parameter")
    home = parameters[0].device
    example = {key: value[:EXAMPLES].detach().to(home) for key, value in example_batch.items()}
    with quiet_torch():
        found = captured(model, example, seed=seed, autocast=autocast)
        if verify and not any(p.is_meta for p in parameters):
            verified(model, example, found)
    return found


@contextmanager
def quiet_torch() -> Iterator[None]:
    """What torch prints about a model that it cannot export, our error says again in a line."""
    if os.environ.get(TRACEBACK) or os.environ.get("TORCH_LOGS"):
        yield
        return
    set_logs(all=logging.CRITICAL)
    with redirect_stderr(StringIO()) as said:
        yield
    sys.stderr.write(said.getvalue())  # of a model that can be: its own words
