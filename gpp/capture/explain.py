"""One readable message for a module that torch.export refuses, and nothing else on the terminal."""

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import nn


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's own log and warnings off the terminal: what matters is in the exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def explain(model: nn.Module, error: Exception) -> str:
    """One paragraph: which module and where, what torch said, what helps."""
    text = str(error).strip()
    if "specialized it to be a constant" in text or "Constraints violated" in text:
        reason = (
            "it turns the batch size into a fixed number (len(x), float(x.shape[0]), int(...), a Python "
            "branch on it)"
        )
        remedy = (
            "keep the batch size symbolic: x.shape[0] for len(x), torch.ones_like(x[:, 0]).sum() for a "
            "number to compute with"
        )
    elif _mentions(text, "data-dependent", "Could not guard", "GuardOnDataDependentSymNode", "Dynamo failed"):
        reason = "its Python control flow depends on the values of a tensor (.item(), if on a tensor)"
        remedy = "use torch.where or masks"
    else:
        first = next((line.strip() for line in text.splitlines() if line.strip()), "no reason")
        reason = f"torch.export says: {type(error).__name__}: {first}"
        remedy = "export it alone with torch.export.export to see more"
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        reason = f"its module {scripted[0]!r} is a torch.jit.ScriptModule, which has no Python to trace"
        remedy = "use the plain module that it was scripted from"
    return f"{type(model).__name__} cannot be captured{place(model, error)}: {reason}. To help: {remedy}"


def _mentions(text: str, *phrases: str) -> bool:
    return any(phrase in text for phrase in phrases)


def place(model: nn.Module, error: BaseException) -> str:
    """Where it happened: the innermost submodule that was running, the innermost line of the model's code."""
    names = {id(module): name for name, module in model.named_modules()}
    files = {
        inspect.getsourcefile(type(m)) for m in model.modules() if not type(m).__module__.startswith("torch.")
    }
    module = line = ""
    seen: BaseException | None = error
    while seen is not None and not line:
        trace = seen.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            owner = names.get(id(frame.f_locals.get("self")))
            module = f" in module {owner!r}" if owner else module
            if frame.f_code.co_filename in files:
                line = f" at {frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        seen = seen.__cause__ or seen.__context__
    return module + line
