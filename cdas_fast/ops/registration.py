"""Registration of the ops with torch, under the namespace `cdas_fast`.

A registered op is opaque to `torch.compile`, which sees its schema, its fake and its autograd formula alone. It is
defined on a `torch.library.Library`; `torch.library.custom_op` adds a check of its own to every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cdas_fast.errors import UnsupportedError

_LIBRARY = torch.library.Library("cdas_fast", "FRAGMENT")


def register(
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define the op of `schema` and return it.

    Args:
        schema: name, arguments and results, as `torch.library` writes them.
        kernel: the function that runs, on every device and below autograd.
        fake: allocates results of the right shape and dtype, and computes nothing.
        setup_context: keeps for `backward` what it needs, see `torch.library.register_autograd`.
        backward: gradients of the arguments from those of the results.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cdas_fast::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"cdas_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.cdas_fast, name).default


def no_second_derivative(what: str) -> Callable[..., None]:
    """A `backward` for the op that makes the gradients: it refuses, in the name of `what`."""

    def backward(ctx: Any, *_: Any) -> None:
        raise UnsupportedError(f"{what} no second derivative")

    return backward
