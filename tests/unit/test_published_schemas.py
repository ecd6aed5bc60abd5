"""infra/ holds to the schemas that compose and KubeRay publish, where they are at hand.

They are not part of this project: DDPM_SCHEMAS, or ../shared/schemas, is a folder that has them.
"""

from typing import Any

import jsonschema
import pytest

from tests.infra import (
    BUILDS,
    KUBERNETES,
    built,
    compose,
    pod_templates,
    schema,
)


def with_defaults(value: Any, rule: dict[str, Any], path: str = "") -> Any:
    """Fill in a CRD's defaults, as the API server does before it validates.

    Raises:
        AssertionError: a key that the CRD does not have. The API server would drop it in silence.
    """
    if isinstance(value, list):
        return [
            with_defaults(it, rule.get("items", {}), f"{path}[{i}]") for i, it in enumerate(value)
        ]
    if not isinstance(value, dict):
        return value
    known = rule.get("properties", {})
    if "additionalProperties" not in rule and known:
        unknown = set(value) - set(known)
        assert not unknown, f"{path} has no {unknown}"
    others = rule.get("additionalProperties", {})
    defaults = {key: it["default"] for key, it in known.items() if "default" in it}
    return {
        key: with_defaults(
            it, known.get(key, others if isinstance(others, dict) else {}), f"{path}.{key}"
        )
        for key, it in {**defaults, **value}.items()
    }


def check_against_crd(it: dict[str, Any]) -> None:
    crd = schema(f"kuberay-{it['kind'].lower()}.json")
    assert it["apiVersion"] == f"{crd['group']}/{crd['version']}"
    rule = crd["schema"]
    # as in every CRD; the API server knows them
    rule["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
    jsonschema.Draft202012Validator(rule).validate(with_defaults(it, rule, it["kind"]))


def test_infra_holds_to_the_published_schemas() -> None:
    of_compose = jsonschema.Draft7Validator(schema("compose-spec.json"))
    for name in ("compose.yaml", "compose.gpu.yaml"):
        of_compose.validate(compose(name))
    for build in BUILDS:
        for it in built(KUBERNETES / build):
            if it["kind"].startswith("Ray"):
                check_against_crd(it)
    cluster = schema("kuberay-raycluster.json")["schema"]["properties"]["spec"]["properties"]
    of_pods = cluster["headGroupSpec"]["properties"]["template"]
    of_pods["properties"]["metadata"] = {}
    platform = [it for it in built(KUBERNETES / "base") if not it["kind"].startswith("Ray")]
    for template in (template for it in platform for template in pod_templates(it)):
        filled_in = with_defaults(template, of_pods, "pod")
        jsonschema.Draft202012Validator(of_pods).validate(filled_in)
    template["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(AssertionError, match="readinesProbe"):
        with_defaults(template, of_pods)
