"""What a run asks of a rank's weights, whoever keeps them: real ones, or an emulated device's none."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from .communicator import Communicator


class RankState(Protocol):
    """Weights, gradients and optimizer of the stages of one rank. See `gpp.runtime.state.StageState`."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """By full name."""

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """By full name."""

    @property
    def norm(self) -> float | None:
        """The global norm of the last step's gradients, if it was asked for."""

    @property
    def learning_rate(self) -> float | None:
        """Of the step to come; None where nothing learns."""

    @property
    def arguments(self) -> Mapping[int, Sequence[Tensor]]:
        """By stage, the parameters that its functions take."""

    @property
    def buffer_arguments(self) -> Mapping[int, Sequence[Tensor]]:
        """By stage, the buffers that its functions take."""

    @property
    def sums(self) -> Mapping[int, Sequence[Tensor]]:
        """By stage, what the gradients of its trainable parameters are added to, in order."""

    def reach(self, stage: int, found: Sequence[bool]) -> None:
        """Which of these have had something added to them."""

    def reduce(self, comm: Communicator, group: tuple[int, ...], stage: int, shared: int) -> None:
        """Sum a stage's gradients, or those of a tied group, over `group`."""

    @property
    def checks_finite(self) -> bool:
        """Whether a step whose loss or gradients are not finite is to be undone."""

    def begin(self) -> None:
        """Before a training step."""

    def gather_norms(self, comm: Communicator, group: tuple[int, ...], *, finite_loss: bool = True) -> bool:
        """Learn the norms of all ranks' gradients, and whether all is finite on all ranks."""

    def undo(self) -> tuple[str, ...]:
        """Leave the step out. Returns the parameters whose gradients are not finite."""

    def scale(self, weight: float) -> None:
        """Divide the gradients."""

    def update(self) -> float | None:
        """Step the optimizer. Returns the global norm if it was asked for."""

    def spread(self, comm: Communicator) -> None:
        """Hand what only this replica has updated to the others."""

    def advance(self) -> None:
        """The end of a step."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the parameters have the values of their moving averages."""
