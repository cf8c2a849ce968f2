"""The files of deploy/: what can be said of them without Docker, Kubernetes and GPUs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

from ray.serve.schema import ServeDeploySchema

from magicface_rt.serve import ServeSettings
from magicface_rt.serve import ray as on_ray
from magicface_rt.serve.ray.cluster import system_config
from magicface_rt.serve.ray.plan import RayPlan

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def manifest() -> dict[str, Any]:
    documents = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "rayservice.yaml").read_text())}
    assert set(documents) == {"PersistentVolumeClaim", "NetworkPolicy", "RayService"}
    return documents["RayService"]["spec"]


def pods() -> list[dict[str, Any]]:
    cluster = manifest()["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


CONFIGS = {
    "serve.yaml": lambda: yaml.safe_load((DEPLOY / "serve.yaml").read_text()),
    "rayservice.yaml": lambda: yaml.safe_load(manifest()["serveConfigV2"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_one_that_serve_takes_and_its_arguments_are_the_builders(name: str) -> None:
    config = ServeDeploySchema.model_validate(CONFIGS[name]())
    (application,) = config.applications
    module, _, builder = application.import_path.partition(":")
    assert module == on_ray.__name__
    assert len(inspect.signature(getattr(on_ray, builder)).parameters) == 1
    plan = RayPlan.of(application.args)
    assert (plan.range, plan.gpus) == ((1, 4), 1.0)
    assert plan.token_file is not None
    assert config.logging_config is not None
    assert config.logging_config.enable_access_log is False


def test_no_request_gets_to_a_disk_on_the_clusters_that_they_describe() -> None:
    needed = system_config(ServeSettings().body_bytes)
    image = (DEPLOY / "Dockerfile").read_text()
    guide = (DEPLOY / "README.md").read_text()
    for pod in pods():
        (container,) = pod["containers"]
        found = {one["name"]: one["value"] for one in container["env"]}
        for name, value in needed.items():
            assert found[f"RAY_{name}"] == str(int(value))
            assert f"RAY_{name}={int(value)}" in image
            assert f"RAY_{name}={int(value)}" in guide


def test_nothing_runs_as_root_and_others_do_not_reach_ray() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    assert lines.index("USER 10001:10001") < next(n for n, line in enumerate(lines) if line.startswith("ENTRYPOINT"))
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/concepts", "/bundles", "/run/secrets/magicface"} <= mounts
        assert {mount["name"] for mount in container["volumeMounts"]} <= {one["name"] for one in pod["volumes"]}
    assert manifest()["rayClusterConfig"]["authOptions"]["mode"] == "token"
