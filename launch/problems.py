"""All problems of a configuration at once.

A reader of settings is a function that raises at the first thing that is wrong. `Collected` runs many of
them, and raises what all of them found as one SettingsError. What two found alike is said once, so a reader
may read again what it depends on.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Literal, ParamSpec, TypeVar, cast

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

P = ParamSpec("P")
T = TypeVar("T")

# What a user can mend; anything else is a fault of this program.
EXPECTED = (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException)


class SettingsError(ValueError):
    """Values of the configuration that cannot be: `problems` has a sentence for each."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        """The sentence, or a numbered list of them."""
        if len(self.problems) == 1:
            return self.problems[0]
        lines = [f"{i}. {text}" for i, text in enumerate(self.problems, 1)]
        return "\n".join([f"the configuration has {len(lines)} problems:", *lines])


def group_of(config: DictConfig, key: str) -> DictConfig:
    """A group of the configuration. Raises SettingsError for what is none."""
    found = OmegaConf.select(config, key)
    if not isinstance(found, DictConfig):
        raise SettingsError(f"{key} must be a group of keys, it is {found!r}")
    return found


class Collected:
    """`with Collected() as read:` runs readers by `read(reader, argument, ...)`, which returns what the
    reader does. The end of the block raises SettingsError if any of them failed.

    What a reader that failed would have returned is None, whatever its type: the block's own result then
    counts for nothing, and neither does what else goes wrong in it.
    """

    def __init__(self) -> None:
        self._found: dict[str, None] = {}

    def __call__(self, reader: Callable[P, T], /, *given: P.args, **named: P.kwargs) -> T:
        """What the reader returns."""
        try:
            return reader(*given, **named)
        except SettingsError as error:
            self._found |= dict.fromkeys(error.problems)
        except EXPECTED as error:
            self._found[_said(error)] = None
        return cast(T, None)

    def __enter__(self) -> "Collected":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if self._found and (error is None or isinstance(error, Exception)):
            raise SettingsError(*self._found) from None
        return False


def _said(error: Exception) -> str:
    """The sentence of an error; OmegaConf says in lines of their own where it is."""
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    return str(error) or type(error).__name__
