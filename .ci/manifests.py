"""The README's YAML is what Kubernetes accepts, in the oldest version that the README names and
in the newest one known here; and what KEDA knows.

    python .ci/manifests.py

It needs the Python packages kubernetes-validate and cloudcoil-models-keda.
"""
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject

KINDS = "Deployment HorizontalPodAutoscaler PodDisruptionBudget ScaledObject Service"


def dropped(given: Any, kept: Any, where: str) -> Iterator[str]:
    """The fields that the model does not know: a cluster would drop them without a word."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{where}.{key}"
            else:
                yield from dropped(value, kept[key], f"{where}.{key}")
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from dropped(value, kept[index], f"{where}[{index}]")


def main() -> None:
    text = (
        Path(__file__).resolve().parent.parent.joinpath("README.md").read_text("utf-8")
    )
    oldest = re.search(r"needs Kubernetes (1\.\d+) or newer", text)
    assert oldest, "README.md does not say which Kubernetes it needs"
    versions = [oldest[1], str(kubernetes_validate.latest_version())]
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    documents = [each for block in blocks for each in yaml.safe_load_all(block)]
    assert sorted(each["kind"] for each in documents) == KINDS.split()
    for document in documents:
        if document["apiVersion"].startswith("keda.sh/"):
            model = ScaledObject.model_validate(document)
            unknown = list(
                dropped(document, model.model_dump(mode="json", by_alias=True), "")
            )
            assert not unknown, f"KEDA knows no {unknown}"
            print(f"{document['kind']}: accepted by KEDA")
        else:
            for version in versions:
                kubernetes_validate.validate(document, version, strict=True)
            print(
                f"{document['kind']}: accepted by Kubernetes {' and '.join(versions)}"
            )


if __name__ == "__main__":
    main()
