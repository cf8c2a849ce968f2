"""Is there a GPU here, and is it the one that a plan is for?"""

from __future__ import annotations

from collections.abc import Sequence

from magicface_rt.backends.device import Device
from magicface_rt.errors import BackendMissingError, DeviceError, TargetError

from .flavour import Flavour
from .targets import Target


def capability_here(device: int = 0) -> str | None:
    """The compute capability, such as "8.9", of the GPU with this ordinal; None if there is none that can be used."""
    try:
        return Device(device).compute_capability
    except (BackendMissingError, DeviceError):
        return None


def can_load(capabilities: Sequence[str], device: int = 0) -> bool:
    """Whether the GPU is one of those that a plan is for."""
    return capability_here(device) in capabilities


def check_target(flavour: Flavour, target: Target, device: int = 0) -> None:
    """Check that a flavour can build for a target here.

    `tensorrt` tries out kernels while it builds, so it must build on the GPU that will serve.

    Raises:
        DeviceError, BackendMissingError: no GPU can be used, and the flavour needs one.
        TargetError: the target is not for the GPU that is here.
    """
    if flavour.builds_without_gpu:
        return
    found = Device(device).compute_capability
    if found not in target.compute_capabilities:
        raise TargetError(
            f"target {target.name} is for compute capability {', '.join(target.compute_capabilities)}, and the GPU "
            f"here has {found}. {flavour.name} builds on the GPU that it builds for: run this there, or name the "
            "target of this GPU."
        )
