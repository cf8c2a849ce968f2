"""Serving on Ray Serve: the same HTTP application, with replicas on one machine or many. All of it is server side.

    magicface-rt serve BUNDLE --engine ray --replicas 2
    serve deploy deploy/serve.yaml                         # import_path: magicface_rt.serve.ray:application

Needs the extras `serve` and `ray`; Ray is imported only when it is used. What the service promises, and what Ray does
with what is sent: docs/serving-ray.md.
"""

from __future__ import annotations

from typing import Any

from .. import module
from .plan import RayPlan

__all__ = ["RayPlan", "application", "serve"]


def application(args: dict[str, Any]) -> Any:
    """Build the application; a Serve config file names this function.

    args  `bundle` and `concepts`, folders that every node has; `replicas`, `gpus`, `cpus`, `workers`, `page`, `tokens`
          (the path of a file), `revision`; the settings of `ServeSettings` and of `Session` by their names, but
          `ServeSettings.concepts` as `most_concepts`

    Raises:
        OptionError: an argument that is missing, not known, or out of its range.
        BackendMissingError: an extra is not installed.
    """
    plan = RayPlan.of(args)
    return module("ray.deployments").build(plan)


def serve(plan: RayPlan, **options: Any) -> int:
    """Start Ray on this machine and serve until a signal; see `cluster.serve`."""
    found: int = module("ray.cluster").serve(plan, **options)
    return found
