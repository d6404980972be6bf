"""The files for Kubernetes are what its API accepts, and their parts fit together.

The schemas are those of the package kubeflow-trainer-api, which are made from the OpenAPI documents of Kubernetes, JobSet and
Kubeflow Trainer. Its classes leave out fields that they do not know, so what they return is compared with what they were given.
"""

import copy
from pathlib import Path
from typing import Any

import kubeflow_trainer_api.models as api
import pytest
import yaml
from pydantic import ValidationError
from torch.distributed.run import get_args_parser

from tests.conftest import ROOT

KINDS: dict[tuple[str, str], Any] = {
    ("v1", "PersistentVolumeClaim"): api.IoK8sApiCoreV1PersistentVolumeClaim,
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): api.JobsetV1alpha2JobSet,
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): api.TrainerV1alpha1TrainingRuntime,
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): api.TrainerV1alpha1TrainJob,
}
FILES = sorted((ROOT / "deploy").glob("*.yaml"))


def objects(path: Path) -> dict[str, Any]:
    """Kind -> object."""
    return {values["kind"]: values for values in yaml.safe_load_all(path.read_text())}


def problems(values: dict[str, Any]) -> str:
    """What its schema does not accept; empty if it accepts everything."""
    try:
        accepted = KINDS[values["apiVersion"], values["kind"]].from_dict(copy.deepcopy(values)).to_dict()
    except ValidationError as error:
        return str(error)
    return "" if accepted == values else f"{values} is not {accepted}"


def jobset(found: dict[str, Any]) -> Any:
    return (found["JobSet"] if "JobSet" in found else found["TrainingRuntime"]["spec"]["template"])["spec"]


def test_there_is_a_file_for_each_way() -> None:
    assert [path.name for path in FILES] == ["jobset.yaml", "trainjob.yaml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_schemas_accept_every_object(path: Path) -> None:
    assert {kind: problems(values) for kind, values in objects(path).items()} == dict.fromkeys(objects(path), "")


def test_the_schemas_refuse_mistakes() -> None:
    for place, key, value in (
        (lambda o: o["JobSet"]["spec"]["failurePolicy"], "maxRestart", 3),
        (lambda o: o["JobSet"]["spec"]["failurePolicy"], "maxRestarts", "3"),
        (lambda o: jobset(o)["replicatedJobs"][0]["template"]["spec"]["template"]["spec"], "gracePeriod", 3),
        (lambda o: jobset(o)["replicatedJobs"][0]["template"]["spec"]["template"]["spec"], "containers", None),
    ):
        found = objects(ROOT / "deploy" / "jobset.yaml")
        place(found)[key] = value
        assert problems(found["JobSet"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_pod_has_time_to_save_and_its_folders(path: Path) -> None:
    found = objects(path)
    (job,) = jobset(found)["replicatedJobs"]
    assert job["template"]["spec"]["backoffLimit"] == 0 and jobset(found)["failurePolicy"]["maxRestarts"] > 0
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == found["PersistentVolumeClaim"]["metadata"]["name"]
    script = found["TrainJob"]["spec"]["trainer"]["args"][0] if "TrainJob" in found else container["args"][0]
    assert script.startswith("exec torchrun ")
    options = get_args_parser().parse_args(script.split()[2:])
    assert options.module and options.training_script == "internevo" and options.training_script_args[0] == "train"
    assert options.rdzv_backend == "c10d" and 0 < options.shutdown_timeout < pod["terminationGracePeriodSeconds"]


def test_the_pods_of_the_jobset_meet_at_the_first_of_them() -> None:
    values = objects(ROOT / "deploy" / "jobset.yaml")["JobSet"]
    (job,) = values["spec"]["replicatedJobs"]
    spec, network = job["template"]["spec"], values["spec"]["network"]
    options = get_args_parser().parse_args(spec["template"]["spec"]["containers"][0]["args"][0].split()[2:])
    assert options.rdzv_endpoint == f"{values['metadata']['name']}-{job['name']}-0-0.{network['subdomain']}:29500"
    assert int(options.nnodes) == spec["parallelism"] == spec["completions"]
    limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert options.nproc_per_node == limits["nvidia.com/gpu"]


def test_the_train_job_refers_to_its_runtime() -> None:
    found = objects(ROOT / "deploy" / "trainjob.yaml")
    runtime, reference = found["TrainingRuntime"], found["TrainJob"]["spec"]["runtimeRef"]
    assert f"{reference['apiGroup']}/v1alpha1" == runtime["apiVersion"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    # With this label and these names, Kubeflow puts the TrainJob's command into the container.
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert job["name"] == job["template"]["spec"]["template"]["spec"]["containers"][0]["name"] == "node"
    trainer = found["TrainJob"]["spec"]["trainer"]
    assert str(trainer["numProcPerNode"]) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
