"""What infra/ tells people and Prometheus: commands, places, metrics and alerts that exist."""

import ast
import json
import re
import shlex
from typing import Any

import typer
import yaml

from tasks.__main__ import app
from tests.conftest import ROOT
from tests.infra import BUILDS, FILES, INFRA, KUBERNETES, built, documents
from tests.pages import fences

RUNBOOK = (INFRA / "RUNBOOK.md").read_text()
README = (INFRA / "README.md").read_text()
ALERTS = [
    rule
    for group in documents(INFRA / "monitoring" / "alerts.yml")[0]["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((INFRA / "monitoring" / "grafana.json").read_text())


def texts() -> dict[str, str]:
    files = [
        path for path in INFRA.rglob("*") if path.is_file() and path.suffix not in (".json", ".pyc")
    ]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


def ddpm_commands() -> list[tuple[str, list[str]]]:
    """(file, words after `ddpm`) of every command that is written out."""
    commands = []
    for file, text in texts().items():
        text = re.sub(r"\n\s+(?=--)", " ", text)  # a folded entrypoint
        for found in re.findall(r"(?<![\w./:-])(?<!-n )ddpm ([a-z]+\b[^`\n#\"]*)", text):
            words = found.split(" | ")[0].replace("...", "").strip().rstrip(",.")
            try:
                commands.append((file, shlex.split(words)))
            except ValueError:
                commands.append((file, words.split()))
    return commands


def test_every_ddpm_command_exists_with_its_options() -> None:
    command = typer.main.get_command(app)
    verbs: dict[str, Any] = command.commands  # type: ignore[attr-defined]
    commands = ddpm_commands()
    assert {"run", "serve", "submit", "promote", "rollback", "history"} <= {
        w[0] for _, w in commands
    }
    for file, (verb, *words) in commands:
        assert verb in verbs, f"{file}: ddpm {verb}"
        options = {name for parameter in verbs[verb].params for name in parameter.opts}
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in options, f"{file}: ddpm {verb} {word}"


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z./]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    named = [
        target
        for text in [*texts().values(), workflow]
        for line in re.findall(r"(?:^|`|run: |#   )make ([a-z./ ]+)", text, re.MULTILINE)
        for target in line.split()
    ]
    assert {"image", "up", "lint", "test"} <= set(named) <= targets


def test_every_place_exists() -> None:
    roots = {
        "infra|configs|tests|pipeline|tasks": ROOT,
        "docker|kubernetes|monitoring|vms": INFRA,
        "base|gpu-spot": INFRA / "kubernetes",
    }
    for file, text in texts().items():
        here = (ROOT / file).parent
        for folders, root in roots.items():
            for place in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]+\w", text):
                if place not in ("infra/.env", "infra/keys/keys.txt"):  # the operator's
                    assert (root / place).exists(), f"{file}: {place}"
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (here / link).exists(), f"{file}: {link}"
    tree = re.findall(
        r"^( *)([\w./-]+)  ",
        next(it.text for it in fences(README) if not it.language),
        re.MULTILINE,
    )
    above: dict[int, str] = {}
    for indent, name in tree:
        place = above.get(len(indent) - 2, "") + name
        above[len(indent)] = place
        assert (INFRA / place).exists(), place


def test_every_service_and_object_that_a_command_names_exists() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    executed = [
        re.sub(r"^(-\S+ )+", "", rest).split()[0]
        for text in texts().values()
        for rest in re.findall(r"compose\.yaml exec (.+)", text)
    ]
    assert executed and set(executed) <= services.keys()
    objects = [it for place in (*BUILDS, *FILES) for it in built(KUBERNETES / place)]
    there = {(it["kind"].lower(), it["metadata"]["name"]) for it in objects}
    named = re.findall(r"-n ddpm (?:get|delete|exec) ([a-z]+)[ /]([\w-]+)", RUNBOOK)
    assert len(named) >= 4 and set(named) <= there


def metrics() -> set[str]:
    """The names of all series that the project and Ray's nodes tell Prometheus."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    names = {f"ray_{name}" for name in METRICS_GAUGES}
    endings = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}
    for node in ast.walk(ast.parse((ROOT / "tasks" / "service" / "metrics.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            for ending in endings.get(node.func.id, []):
                (name, *_) = node.args
                assert isinstance(name, ast.Constant)
                names.add(f"ray_{name.value}{ending}")
    return names | {"up"}


DRAWN = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def expressions() -> list[str]:
    return DRAWN + [rule["expr"] for rule in ALERTS]


def test_alerts_ask_for_what_the_dashboard_draws() -> None:
    """Which tests/system/test_operation.py holds to a running service."""
    asked = {name for rule in ALERTS for name in re.findall(r"ray_ddpm_\w+", rule["expr"])}
    assert asked and asked <= set(re.findall(r"ray_ddpm_\w+", " ".join(DRAWN)))


FUNCTIONS = {"sum", "rate", "histogram_quantile", "and", "unless"}


def test_every_metric_is_told_by_the_service_or_by_ray() -> None:
    from tasks.service.metrics import OUTCOMES

    there = metrics()
    for expression in expressions():
        bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|by \([^)]*\)", "", expression)
        names = set(re.findall(r"[a-z_]{2,}", bare)) - FUNCTIONS
        assert names and names <= there, f"{names - there} of {expression}"
        assert expression.count("(") == expression.count(")")
        for outcomes in re.findall(r"outcome=~?\"([^\"]+)\"", expression):
            assert set(outcomes.split("|")) <= set(OUTCOMES)
    jobs = {
        it["job_name"]
        for it in documents(INFRA / "monitoring" / "prometheus.yml")[0]["scrape_configs"]
    }
    assert {job for it in expressions() for job in re.findall(r"job=\"(\w+)\"", it)} <= jobs


def test_prometheus_and_grafana_find_their_files() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    (files,) = [documents(INFRA / "monitoring" / "prometheus.yml")[0]["rule_files"]]
    mounted = {m.split(":")[1]: m.split(":")[0] for m in services["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{name}" for name in files} <= mounted.keys()
    mounted = {m.split(":")[1]: m.split(":")[0] for m in services["grafana"]["volumes"]}
    folder = documents(INFRA / "monitoring" / "dashboards.yml")[0]["providers"][0]["options"][
        "path"
    ]
    assert mounted[f"{folder}/ddpm.json"] == "./monitoring/grafana.json"


def test_every_alert_has_a_paragraph_and_every_panel_a_row() -> None:
    headings = set(re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE))
    assert {rule["alert"] for rule in ALERTS} == headings
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"RUNBOOK.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"] and rule["for"]
        assert rule["labels"]["severity"] in ("page", "ticket")
    rows = re.findall(
        r"^\| ([^|]+) \|", RUNBOOK.split("## Read the dashboard")[1].split("\n## ")[0], re.M
    )
    assert [panel["title"] for panel in DASHBOARD["panels"]] == [
        r for r in rows if r not in ("panel", "---")
    ]


def test_an_image_that_is_stuck_is_older_than_any_may_be() -> None:
    from pipeline.serving.config import ServingConfig
    from tasks.service.application import PATIENCE

    (stuck,) = (rule for rule in ALERTS if rule["alert"] == "ReplicaIsStuck")
    longest = ServingConfig().max_seconds + PATIENCE
    assert float(stuck["expr"].split(">")[1]) >= longest


def test_the_figures_of_the_cost_were_measured() -> None:
    results = (ROOT / "tests" / "benchmarks" / "RESULTS.md").read_text()
    cost = RUNBOOK.split("## What a run costs")[1]
    figures = set(re.findall(r"\b\d+\.\d+\b(?! million)", cost))
    assert len(figures) >= 9
    missing = [it for it in figures if not re.search(rf"(?<![\d.]){re.escape(it)}(?!\d)", results)]
    assert missing == []


def test_every_config_key_exists() -> None:
    from pipeline.config import RunConfig

    sections = "data|training|serving|cluster|evaluation|tracking"
    named = {
        name
        for text in texts().values()
        for name in re.findall(rf"(?<![\w./])((?:{sections})\.(?!yaml|py)[a-z_]+)\b(?!\()", text)
    }
    assert {"serving.max_rows", "training.checkpoint_every", "cluster.cache"} <= named
    for name in named:
        section, key = name.split(".")
        model = RunConfig.model_fields[section].annotation
        assert key in model.model_fields, name  # type: ignore[union-attr]
