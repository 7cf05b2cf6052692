"""The device that somebody asks for."""

from __future__ import annotations

import torch


def usable_device(device: torch.device | str | None) -> torch.device:
    """Args: device: as torch spells them; `None`: a GPU if there is one.

    Raises `ValueError` for one that is none, or not there.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`device={str(device)!r}` cannot be used here ({reason}); expected cpu, cuda or cuda:N"
        ) from error
    return found
