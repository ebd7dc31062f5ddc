"""The chart's checks. `.ci/helm` installs what they need and calls them.

    checks.py docs [--write]   README.md and values.schema.json agree with values.yaml and the server's settings (--write updates them)
    checks.py lint             helm lint --strict, with every file of values
    checks.py refused          the chart refuses the values of refused.yaml with the expected messages
    checks.py memory           the values give the server the right limits on the memory of the host and of the GPUs
    checks.py manifests        renders every file of values for every version of Kubernetes, and validates all manifests
    checks.py mutations        the validation finds a misspelt field at every place of these manifests
    checks.py policies         checkov

Environment variables: HELM, NODE and CHECKOV are the programs, CRDS is the folder with the models
of custom resources, RENDERED the folder for manifests.
"""

import concurrent.futures
import copy
import functools
import importlib.resources
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jsonschema
import referencing
import yaml

CI = pathlib.Path(__file__).resolve().parent
CHART = CI.parent
ROOT = CHART.parents[2]
# The files of ci/ set every value, those of examples/ have one purpose each.
VALUES = sorted(CI.glob("*-values.yaml")) + sorted((CHART / "examples").glob("*.yaml"))
# From the chart's kubeVersion to the newest with schemas.
KUBERNETES = [f"1.{minor}.0" for minor in range(30, 38)]
NAMESPACE = "models"
# Settings that the chart sets from other values, and these values. The templates refuse the
# settings in `config`, because the schema's message would not name the values.
MANAGED = yaml.safe_load((CHART / "files/managed-settings.yaml").read_text())
CUSTOM = ("monitoring.coreos.com/", "keda.sh/", "gateway.networking.k8s.io/")
# Custom resources of examples whose schemas are in no package. They are not validated.
UNKNOWN = ("cert-manager.io/",)

failures = []


def check(ok, message):
    if not ok:
        failures.append(message)
        print(f"FAILED: {message}")


def run(*command, stdin=None):
    return subprocess.run(list(map(str, command)), input=stdin, capture_output=True, text=True)


def helm(*command):
    return run(os.environ["HELM"], *command)


# -- documentation --------------------------------------------------------------------------------------------------------------------


def described(text):
    """Returns (path, description) of each key of values.yaml with a `# --` comment, and the paths
    of all leaf keys without one."""
    lines, found, bare = text.splitlines(), [], []

    def walk(node, path):
        for key, value in node.value:
            here = (*path, key.value)
            comment, n = [], key.start_mark.line
            while n and lines[n - 1].strip().startswith("#"):
                comment.insert(0, lines[n := n - 1].strip().lstrip("#").strip())
            start = next((i for i, line in enumerate(comment) if line.startswith("-- ")), None)
            if start is not None:
                found.append((here, " ".join(comment[start:])[3:]))
            elif not (isinstance(value, yaml.MappingNode) and value.value):
                bare.append(here)
            if isinstance(value, yaml.MappingNode):
                walk(value, here)

    walk(yaml.compose(text), ())
    return found, bare


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def sections(text):
    """Returns the section of each top-level key of values.yaml: the last `# ==` above it."""
    title, found = None, {}
    for line in text.splitlines():
        if line.startswith("# == "):
            title = line.removeprefix("# == ")
        elif key := re.match(r"(\w+):", line):
            check(title is not None, f"values.yaml: {key[1]} is in no section")
            found[key[1]] = title
    return found


def settings():
    """Returns the server's settings with their help texts, from its source."""
    source = (ROOT / "src/cli/settings.rs").read_text()
    table = re.search(r"pub const SETTINGS.*?= &\[(.*?)\n\];", source, re.S).group(1)
    found = re.findall(r'\(\s*"([a-z0-9_]+)",\s*"(?:[^"\\]|\\.)*",\s*"((?:[^"\\]|\\.)*)",?\s*\)', table, re.S)
    assert len(found) == table.count('("') + len(re.findall(r'\(\n\s*"', table)) and len(found) > 30, "the table of settings is not understood"
    # A backslash at the end of a line joins it with the next, without the blanks between.
    return {name: re.sub(r"\\\n\s*", "", help).replace('\\"', '"') for name, help in found}


# JSON schemas of a number from 0 to 1 and of a size. A quoted number is valid, too.
SHARE = {"type": ["number", "string"], "maximum": 1, "pattern": r"^(0|0?\.[0-9]+|1(\.0*)?)$"}
SIZE = {"type": ["integer", "string"], "minimum": 0, "pattern": "^[0-9]+ *[KMGTkmgt]?i?B?$"}
# Settings whose values neither a number nor a size describes.
FORMS = {
    "missing_devices": {"type": "string", "enum": ["refuse", "skip"]},
    "precision": {"type": "string", "enum": ["f32", "bf16"]},
    "scoring_share": {**SHARE, "exclusiveMinimum": 0},
    "trace_ratio": {**SHARE, "minimum": 0},
    "max_client_priority": {"type": ["integer", "string"], "minimum": -1000, "maximum": 1000, "pattern": "^-?[0-9]{1,4}$"},
    # Without quotes, YAML reads on and off as booleans.
    "rest": {"type": ["string", "boolean"], "enum": ["on", "off", "true", "false", True, False]},
    "log_format": {"type": "string", "enum": ["text", "json"]},
    # The pod's grace period is computed of it, so it must be a number.
    "drain_timeout": {"type": "integer", "minimum": 1},
    "template_date": {"type": "string", "pattern": "^([0-9]{4}-[0-9]{2}-[0-9]{2})?$"},
    "otlp_endpoint": {"type": "string", "pattern": "^(https?://.+)?$"},
}  # fmt: skip


def forms(every):
    """Returns the JSON schemas of the values that the server accepts, by setting. Those of numbers
    and sizes are read from its source."""
    source = "".join((ROOT / file).read_text() for file in ("src/cli/settings.rs", "src/cli/settings/oidc.rs"))
    numbers = re.findall(r'\.number\(\s*"(\w+)",\s*(\d+)\s*\)', source)
    sizes = re.findall(r'\.bytes\(\s*"(\w+)"\s*\)', source)
    assert len(numbers) > 10 and len(sizes) > 3, "the calls that read settings are not understood"
    found = {}
    for name, least in numbers:
        digits = "^[0-9]+$" if least == "0" else "^0*[1-9][0-9]*$"
        found[name] = {"type": ["integer", "string"], "minimum": int(least), "pattern": digits}
    found |= {name: SIZE for name in sizes} | FORMS
    for name in found:
        check(name in every, f"{name} is no setting of the server")
    return found


def documented():
    """Returns the texts that README.md and values.schema.json should have."""
    text = (CHART / "values.yaml").read_text()
    values, schema = yaml.safe_load(text), json.loads((CHART / "values.schema.json").read_text())
    found, bare = described(text)
    known = {path for path, _ in found}
    for path in bare:
        check(any(path[:n] in known for n in range(1, len(path))), f"values.yaml: {'.'.join(path)} has no description")

    every = settings()
    check(set(MANAGED) <= set(every), f"settings that the chart sets are none of the server: {sorted(set(MANAGED) - set(every))}")
    schema["properties"]["config"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"type": ["string", "number", "boolean"], "description": help} for name, help in every.items() if name not in MANAGED},
    }
    for name, instead in MANAGED.items():
        schema["properties"]["config"]["properties"][name] = {"description": f"Refused here: use {instead}."}
    for name, form in forms(every).items():
        if name not in MANAGED:
            schema["properties"]["config"]["properties"][name].update(form)

    rows, section_of, section = [], sections(text), None
    for path, description in found:
        if section_of[path[0]] != section:
            section = section_of[path[0]]
            rows += [""] if rows else []
            rows += [f"### {section}", "", "| Key | Type | Default | Description |", "|-----|------|---------|-------------|"]
        value = at(values, path)
        node = schema
        for key in path:
            node = node["properties"][key]
        if path[0] != "config" or len(path) == 1:
            node["description"] = description
        kind = {bool: "bool", int: "int", str: "string", list: "list", dict: "object"}[type(value)]
        # The keys below have rows of their own.
        below = any(other[: len(path)] == path and other != path for other in known)
        default = "" if below else f"`{json.dumps(value, ensure_ascii=False)}`"
        rows.append(f"| {'.'.join(path)} | {kind} | {default} | {description.replace('|', chr(92) + '|')} |")

    def undescribed(node, path):
        for key, child in node.get("properties", {}).items():
            here = (*path, key)
            if not child.get("properties") and here != ("global",) and path[:1] != ("config",):
                check(any(here[:n] in known for n in range(1, len(here) + 1)), f"values.schema.json: {'.'.join(here)} is not in values.yaml")
            undescribed(child, here)

    undescribed(schema, ())
    readme = (CHART / "README.md").read_text()
    readme = re.sub(r"(<!-- values:.*?-->\n).*(<!-- /values -->)", lambda m: m[1] + "\n" + "\n".join(rows) + "\n\n" + m[2], readme, flags=re.S)
    return {"README.md": readme, "values.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n"}


def docs(write=False):
    for name, text in documented().items():
        if write:
            (CHART / name).write_text(text)
        check((CHART / name).read_text() == text, f"{name} is out of date: run .ci/helm docs")

    # Each value is changed by at least one file of values, so every part of the templates is
    # rendered.
    text = (CHART / "values.yaml").read_text()
    defaults, used = yaml.safe_load(text), [yaml.safe_load(file.read_text()) or {} for file in VALUES]

    def leaves(tree, path=()):
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, (*path, key))
            else:
                yield (*path, key)

    def differs(values, path):
        try:
            return at(values, path) != at(defaults, path)
        except (KeyError, TypeError):
            return False

    for path in leaves(defaults):
        # These values have the form that Kubernetes defines, so changing one key of them is enough.
        whole = next((path[:n] for n in (1, 2) if path[:n] in {(k,) for k in ("resources", "podSecurityContext", "securityContext")} | {("probes", k) for k in ("startup", "liveness", "readiness")}), path)
        check(any(differs(values, whole) for values in used), f"no file of values sets {'.'.join(path)}")


# -- rendering ------------------------------------------------------------------------------------------------------------------------


def lint():
    for file in VALUES:
        result = helm("lint", "--strict", CHART, "-f", file)
        check(result.returncode == 0, f"helm lint {file.name}: {result.stdout}{result.stderr}")
        unexpected = [line for line in result.stdout.splitlines() if line.startswith("[") and "icon is recommended" not in line]
        check(not unexpected, f"helm lint {file.name}: {unexpected}")
    print(f"{len(VALUES)} files of values")


def template(values):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(values, file)
        file.flush()
        return helm("template", "bradley", CHART, "-f", file.name)


def refused():
    cases = yaml.safe_load((CI / "refused.yaml").read_text())
    for case in cases:
        result = template(case["values"])
        check(result.returncode != 0, f"these values were not refused: {case['values']}")
        check(case["says"] in result.stderr, f"{case['values']} was refused with other words than {case['says']!r}: {result.stderr}")
    result = helm("template", "bradley", CHART, "--kube-version", "1.29.0")
    check("incompatible with Kubernetes" in result.stderr, f"Kubernetes 1.29 was not refused: {result.stderr}")
    print(f"{len(cases) + 1} cases")


def render(file, version):
    result = helm("template", "bradley", CHART, "-f", file, "--namespace", NAMESPACE, "--kube-version", version)
    if result.returncode:
        raise RuntimeError(f"{file.name}: {result.stderr}")
    return result.stdout


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


def memory():
    """Checks the memory limits: the host's follows from the container's memory on CPU and GPU pods,
    a GPU's or a MIG slice's is set only by config. Checks the devices, too."""
    gpu, large = {"gpu": {"enabled": True}}, {"resources": {"limits": {"memory": "64Gi"}}}
    cases = (
        # Values; the limit of the host's memory (0.9 · (memory - 1 GiB), in MiB); that of each
        # GPU's; and the devices.
        ({}, "4608MiB", None, None),
        (large, "58060MiB", None, None),
        (gpu, "4608MiB", None, "cuda:0"),
        ({**gpu, **large}, "58060MiB", None, "cuda:0"),
        ({"gpu": {"enabled": True, "count": 3}, **large}, "58060MiB", None, "cuda:0,cuda:1,cuda:2"),
        ({"gpu": {"enabled": True, "device": "auto", "count": 8}, **large}, "58060MiB", None, "auto"),
        ({**gpu, **large, "config": {"device_memory_limit": "60GiB"}}, "58060MiB", "60GiB", "cuda:0"),
        ({**gpu, **large, "config": {"memory_limit": "20GiB"}}, "20GiB", None, "cuda:0"),
        ({**gpu, **large, "config": {"memory_limit": "20GiB", "device_memory_limit": 8589934592}}, "20GiB", "8589934592", "cuda:0"),
        ({**gpu, "resources": {"limits": {"memory": None}}}, None, None, "cuda:0"),
        # The smallest and the largest slices of current GPUs: the size of the slice is no value.
        *(
            ({"gpu": {"enabled": True, "resource": f"nvidia.com/mig-{slice}"}, **large}, "58060MiB", None, "cuda:0")
            for slice in ("1g.5gb", "1g.10gb", "3g.40gb", "7g.141gb")
        ),
    )
    for values, host, device, devices in cases:
        result = template(values)
        check(result.returncode == 0, f"{values}: {result.stderr}")
        config = next((document["data"] for document in documents(result.stdout) if document["kind"] == "ConfigMap"), {})
        found = tuple(config.get(f"BRADLEY_{name}") for name in ("MEMORY_LIMIT", "DEVICE_MEMORY_LIMIT", "DEVICE"))
        expected = host, device, devices
        check(found == expected, f"{values}: the limits of the host and of a GPU, and the devices, are {found}, not {expected}")
    print(f"{len(cases)} cases")


def rendered(versions):
    """Returns the manifests of every file of values, by file and version."""
    jobs = [(file, version) for file in VALUES for version in versions]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = pool.map(lambda job: render(*job), jobs)
    return {(file.name, version): text for (file, version), text in zip(jobs, texts)}


# -- schemas --------------------------------------------------------------------------------------------------------------------------


@functools.cache
def schema_file(version, name):
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    return json.loads((folder / name).read_text())


@functools.cache
def validator(version, kind, api_version):
    """Returns a cached validator. kubernetes-validate would make one for each manifest, from the
    same files."""
    group, _, number = api_version.rpartition("/")
    schema = schema_file(version, "-".join(filter(None, (kind.lower(), group.split(".")[0], number))) + ".json")
    registry = referencing.Resource.from_contents(schema_file(version, "_definitions.json")) @ (
        referencing.Resource.from_contents(schema) @ referencing.Registry()
    )
    return jsonschema.Draft202012Validator(schema, registry=registry)


def is_custom(document):
    return document["apiVersion"].startswith(CUSTOM)


def findings(document, version):
    return [error.message for error in validator(version, document["kind"], document["apiVersion"]).iter_errors(document)]


def custom_findings(documents):
    result = run(os.environ["NODE"], CI / "crds.mjs", os.environ["CRDS"], stdin=json.dumps(documents))
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout)


def manifests():
    folder, core, custom = pathlib.Path(os.environ["RENDERED"]), {}, {}
    for (name, version), text in rendered(KUBERNETES).items():
        target = folder / version / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        found = documents(text)
        for document in found:
            key = json.dumps(document)
            if document["apiVersion"].startswith(UNKNOWN):
                continue
            if is_custom(document):
                custom.setdefault(key, f"{name} {document['kind']}")
            else:
                core.setdefault((version, key), f"{name} {document['kind']}")
        references(name, found)
    for (version, key), where in core.items():
        for message in findings(json.loads(key), version):
            check(False, f"{where}, Kubernetes {version}: {message}")
    for where, found in zip(custom.values(), custom_findings([json.loads(key) for key in custom])):
        check(not found, f"{where}: {found}")
    kinds = sorted({json.loads(key)["kind"] for _, key in core} | {json.loads(key)["kind"] for key in custom})
    print(f"{len(VALUES)} files of values, Kubernetes {', '.join(v[:-2] for v in KUBERNETES)}: {len(core)} manifests, and {len(custom)} custom resources")
    print("kinds:", ", ".join(kinds))
    expected = {
        "ConfigMap", "Deployment", "GRPCRoute", "HorizontalPodAutoscaler", "Ingress", "Job", "NetworkPolicy", "Pod", "PodDisruptionBudget", "PodMonitor",
        "PrometheusRule", "ScaledObject", "Secret", "Service", "ServiceAccount", "ServiceMonitor", "StatefulSet",
    }  # fmt: skip
    check(expected == set(kinds), f"other kinds than expected: {sorted(expected ^ set(kinds))}")


# -- what schemas cannot see ----------------------------------------------------------------------------------------------------------


def bytes_of(quantity):
    number, unit = re.fullmatch(r"(\d+)(\D*)", str(quantity)).groups()
    return int(number) * {"": 1, "Mi": 2**20, "MiB": 2**20, "Gi": 2**30, "GiB": 2**30}[unit]


def values_of(name):
    return yaml.safe_load(next(file for file in VALUES if file.name == name).read_text()) or {}


def alerts(name):
    """Returns files/alerts.yaml with the changes that a file of values asks for."""
    wanted = values_of(name).get("metrics", {}).get("alerts", {})
    spec = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    for group in spec["groups"]:
        group["rules"] = [rule for rule in group["rules"] if rule["alert"] not in wanted.get("disabled", [])]
        for rule in group["rules"]:
            rule["labels"].update(wanted.get("labels", {}))
            if "runbookUrl" in wanted:
                rule["annotations"]["runbook_url"] = f"{wanted['runbookUrl'].rstrip('#')}#{rule['alert'].lower()}"
            if rule["alert"] in wanted.get("thresholds", {}):
                rule["expr"] = re.sub(r"[\d.]+\s*$", f"{wanted['thresholds'][rule['alert']]:g}", rule["expr"])
    return spec


def references(name, found):
    """Checks the references between the objects of a release, and values that have to agree."""
    by_kind = {}
    for document in found:
        by_kind.setdefault(document["kind"], []).append(document)
    names = {kind: {document["metadata"]["name"] for document in documents} for kind, documents in by_kind.items()}

    def must(ok, message):
        check(ok, f"{name}: {message}")

    (workload,) = by_kind.get("Deployment", []) + by_kind.get("StatefulSet", [])
    spec, pod = workload["spec"], workload["spec"]["template"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    (container,) = (each for each in pod["containers"] if each["name"] == "bradley")
    config = next(document["data"] for document in by_kind["ConfigMap"] if document["metadata"]["name"] == workload["metadata"]["name"])

    def selects(selector):
        return selector.items() <= labels.items()

    must(selects(spec["selector"]["matchLabels"]), "the workload does not select its own pods")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for setting, port in (("BRADLEY_LISTEN", "grpc"), ("BRADLEY_HTTP_LISTEN", "http")):
        must(config[setting].endswith(f":{ports[port]}"), f"{setting} is another port than the container's")
    for service in by_kind["Service"]:
        must(selects(service["spec"]["selector"]), f"Service {service['metadata']['name']} selects no pod")
        must(all(port["targetPort"] in ports for port in service["spec"]["ports"]), "a Service's target port is not the container's")
        headless = service["spec"].get("clusterIP") == "None"
        must(not headless or all(port["port"] == ports[port["targetPort"]] for port in service["spec"]["ports"]), "a headless Service's ports are not the pods'")
        exposed = {port["name"] for port in service["spec"]["ports"]}
        must("http" not in exposed or headless, "the plain HTTP port is on a Service that may be a load balancer's")
    must("serviceName" not in spec or spec["serviceName"] in names["Service"], "the StatefulSet's Service does not exist")
    for kind in ("NetworkPolicy", "PodDisruptionBudget"):
        for document in by_kind.get(kind, []):
            selector = document["spec"].get("podSelector") or document["spec"].get("selector")
            must(selects(selector["matchLabels"]), f"{kind} selects no pod")
    for policy in by_kind.get("NetworkPolicy", []):
        must(all(port["port"] in ports for rule in policy["spec"]["ingress"] for port in rule["ports"]), "NetworkPolicy names another port")
        test = next(document for document in by_kind["Pod"])["metadata"]["labels"]
        let_in = [peer["podSelector"]["matchLabels"] for rule in policy["spec"]["ingress"][:1] for peer in rule["from"] if "namespaceSelector" not in peer]
        must(any(selector.items() <= test.items() for selector in let_in), "NetworkPolicy keeps out helm test's pod")
        for job in by_kind.get("Job", []):
            peer, arguments = job["spec"]["template"]["metadata"]["labels"], job["spec"]["template"]["spec"]["containers"][0]["args"]
            calls = arguments[0] == "score-files" and "--models" not in arguments
            must(not calls or any(selector.items() <= peer.items() for selector in let_in), "NetworkPolicy keeps out the Job that scores files")
    for monitor in by_kind.get("ServiceMonitor", []):
        selector = monitor["spec"]["selector"]["matchLabels"]
        chosen = [service for service in by_kind["Service"] if selector.items() <= service["metadata"]["labels"].items()]
        must(len(chosen) == 1, f"ServiceMonitor selects {len(chosen)} Services: each pod must be scraped once")
        must(any(port["name"] == monitor["spec"]["endpoints"][0]["port"] for port in chosen[0]["spec"]["ports"]), "ServiceMonitor names no port")
        must(chosen[0]["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "bradley", "the job is not named after the release")
    for monitor in by_kind.get("PodMonitor", []):
        must(selects(monitor["spec"]["selector"]["matchLabels"]), "PodMonitor selects no pod")
        must(monitor["spec"]["podMetricsEndpoints"][0]["port"] in ports, "PodMonitor names no port")
        must(labels[monitor["spec"]["jobLabel"]] == "bradley", "the job is not named after the release")
    scraped = "prometheus.io/scrape" in spec["template"]["metadata"]["annotations"]
    must(scraped != bool(by_kind.get("ServiceMonitor") or by_kind.get("PodMonitor")), "the pod is scraped twice, or not at all")
    for scaler in by_kind.get("HorizontalPodAutoscaler", []) + by_kind.get("ScaledObject", []):
        target = scaler["spec"]["scaleTargetRef"]
        must((target["kind"], target["name"]) == (workload["kind"], workload["metadata"]["name"]), "the autoscaler has another target")
        must("replicas" not in spec, "the chart and the autoscaler both set the replicas")
    for route in by_kind.get("GRPCRoute", []):
        backend = route["spec"]["rules"][0]["backendRefs"][0]
        chosen = [service for service in by_kind["Service"] if service["metadata"]["name"] == backend["name"]]
        must(chosen and backend["port"] in [port["port"] for port in chosen[0]["spec"]["ports"]], "GRPCRoute has no backend")
    for ingress in by_kind.get("Ingress", []):
        backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        chosen = [service for service in by_kind["Service"] if service["metadata"]["name"] == backend["name"]]
        must(chosen and backend["port"]["name"] in [port["name"] for port in chosen[0]["spec"]["ports"]], "Ingress has no backend")
        protocol = ingress["metadata"]["annotations"].get("nginx.ingress.kubernetes.io/backend-protocol")
        must(protocol in (None, "GRPCS" if "BRADLEY_TLS_CERT" in config else "GRPC"), "Ingress speaks another protocol than the pods")
    for rule in by_kind.get("PrometheusRule", []):
        must(rule["spec"] == alerts(name), "PrometheusRule is not files/alerts.yaml with the changes of metrics.alerts")
        must("{{" in json.dumps(rule["spec"]), "the alerts' own templates are gone")
    for dashboard in (document for document in by_kind["ConfigMap"] if document["metadata"]["name"].endswith("-dashboard")):
        must(dashboard["data"]["bradley.json"].strip() == (CHART / "files/dashboard.json").read_text().strip(), "the dashboard is not files/dashboard.json")
        json.loads(dashboard["data"]["bradley.json"])

    # Several replicas share their data, roll out without a gap, and are spread over nodes.
    if workload["kind"] == "StatefulSet":
        must(spec["replicas"] == 1 and "BRADLEY_ARTIFACT_URL" not in config, "a StatefulSet of several replicas")
        kept = any(claim["metadata"]["name"] == "data" for claim in spec.get("volumeClaimTemplates", []))
        must(kept != any(volume["name"] == "data" for volume in pod["volumes"]), "there are two data volumes, or none")
    else:
        must("BRADLEY_ARTIFACT_URL" in config, "a Deployment without a store of artifacts")
        least = min([scaler["spec"].get("minReplicas", 1) for scaler in by_kind.get("HorizontalPodAutoscaler", [])] + [spec.get("replicas", 1)])
        must(spec["progressDeadlineSeconds"] > container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"], "the rollout fails before the startup probe does")
        must(least == 1 or "topologySpreadConstraints" in pod, "several replicas are not spread")

    # A shutdown must fit into the grace period, and a job's memory into the container's limit. For
    # the 34 seconds see _pod.tpl.
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    must(pod["terminationGracePeriodSeconds"] >= int(config["BRADLEY_DRAIN_TIMEOUT"]) + sleep + 34, "the grace period is too short")
    limit, memory = container["resources"]["limits"]["memory"], config["BRADLEY_MEMORY_LIMIT"]
    must(bytes_of(memory) + 2**30 <= bytes_of(limit), f"BRADLEY_MEMORY_LIMIT {memory} leaves less than 1 GiB of {limit}")
    must(all(isinstance(value, str) and not re.search(r"\de\+\d", value) for value in config.values()), "a setting is no text, or a number in another form")
    for setting in config:
        must(setting in {f"BRADLEY_{known.upper()}" for known in settings()} or re.match("AWS_|GOOGLE_|AZURE_|HF_", setting), f"{setting} is no setting")
    hosts = {service["metadata"]["name"] + end for service in by_kind["Service"] for end in ("", f".{NAMESPACE}", f".{NAMESPACE}.svc")}
    must(hosts <= set(config["BRADLEY_REST_HOSTS"].split(",")), "REST is not answered under the names of the Services")

    # Every pod has the restricted profile, no token and no Services' variables. Mounted volumes and
    # named objects exist.
    jobs = [job["spec"]["template"]["spec"] for job in by_kind.get("Job", [])]
    for each in [pod, *jobs, *(document["spec"] for document in by_kind.get("Pod", []))]:
        must(each["automountServiceAccountToken"] is False and each["enableServiceLinks"] is False, "a pod gets a token, or Services' variables")
        must(each["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", "a pod has no seccomp profile")
        claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])} if each is pod else set()
        volumes = {volume["name"] for volume in each.get("volumes", [])} | claims
        for part in each["containers"] + each.get("initContainers", []):
            context = {**each["securityContext"], **part["securityContext"]}
            must(context["runAsNonRoot"] and context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"], "a container may too much")
            must(context["capabilities"] == {"drop": ["ALL"]}, "a container has capabilities")
            must({mount["name"] for mount in part.get("volumeMounts", [])} <= volumes, "a volume that is mounted does not exist")
            must("command" not in part, "the image's entry point is replaced")
    values = values_of(name)
    # A Job that loads models itself has the hub's token, as the server has.
    for part in [job["containers"][0] for job in jobs]:
        if "--models" in part.get("args", []) and values.get("huggingface", {}).get("token"):
            tokens = [variable["valueFrom"] for variable in part["env"] if variable["name"] == "HF_TOKEN"]
            own_secret = {"secretKeyRef": {"name": workload["metadata"]["name"], "key": "HF_TOKEN"}}
            must(tokens == [own_secret], "a Job that loads models lacks the hub's token")
    # Each index of the Job that scores files is a shard, evictions are no failures, and Kueue admits its pods. By default there is no such Job.
    wanted = yaml.safe_load((CHART / "values.yaml").read_text())["scoreFiles"] | values.get("scoreFiles", {})
    scoring = [job for job in by_kind.get("Job", []) if job["metadata"]["labels"].get("app.kubernetes.io/component") == "score-files"]
    must(len(scoring) == int(wanted["enabled"]), f"{len(scoring)} Jobs score files")
    must(wanted["enabled"] or "score-files" not in json.dumps(found), "there is a part of the Job that scores files, which is off")
    for job in scoring:
        shards, arguments = wanted["shards"], job["spec"]["template"]["spec"]["containers"][0]["args"]
        indexes = {
            "completionMode": "Indexed",
            "completions": shards,
            "parallelism": min(wanted["parallelism"], shards),
            "backoffLimitPerIndex": wanted["backoffLimitPerIndex"],
            "ttlSecondsAfterFinished": wanted["ttlSecondsAfterFinished"],
        }
        different = {field: job["spec"].get(field) for field, value in indexes.items() if job["spec"].get(field) != value}
        must(not different, f"the Job that scores files has {different}, not the values of scoreFiles: {indexes}")
        must(arguments[arguments.index("--shards") + 1] == str(shards), "the Job that scores files has another number of indexes than of shards")
        disruption = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        must(job["spec"]["podFailurePolicy"]["rules"][0] == disruption, "an eviction counts as a failure of the Job that scores files")
        # Kubernetes allows a podFailurePolicy only with this restartPolicy, which its schema does not say.
        must(job["spec"]["template"]["spec"]["restartPolicy"] == "Never", "the Job that scores files has a podFailurePolicy and restarts containers")
        kueue = {label: value for label, value in job["metadata"]["labels"].items() if label.startswith("kueue.x-k8s.io/")}
        queue = {f"kueue.x-k8s.io/{label}": values.get("kueue", {}).get(key) for label, key in (("queue-name", "queueName"), ("priority-class", "priorityClass"))}
        must(kueue == {label: value for label, value in queue.items() if value}, f"the Job that scores files has other labels for Kueue: {kueue}")
    # The registry that a parent chart sets wins, and its pull secrets come first.
    registry = values.get("global", {}).get("imageRegistry") or values.get("image", {}).get("registry")
    repository = values.get("image", {}).get("repository", "bradley")
    must(re.split("[:@]", container["image"])[0] == (f"{registry}/{repository}" if registry else repository), "the image has another registry")
    secrets = [each if isinstance(each, dict) else {"name": each} for each in values.get("global", {}).get("imagePullSecrets", []) + values.get("imagePullSecrets", [])]
    must(pod.get("imagePullSecrets", []) == list({each["name"]: each for each in secrets}.values()), "other pull secrets")
    extras = [each["name"] for key in ("initContainers", "extraContainers") for each in values.get(key, [])]
    must(extras == [each["name"] for each in pod.get("initContainers", []) + pod["containers"] if each is not container], "other containers beside the server")
    must(all(source in container["envFrom"] for source in values.get("extraEnvFrom", [])), "extraEnvFrom is left out")
    must("{{" not in json.dumps([pod, [each for each in found if each["kind"] == "ConfigMap" and "bradley.json" not in each["data"]]]), "a template was not rendered")
    for reference in container["envFrom"]:
        if reference in values.get("extraEnvFrom", []):
            continue
        if "configMapRef" in reference:
            must(reference["configMapRef"]["name"] in names["ConfigMap"], "a ConfigMap does not exist")
        elif reference["secretRef"]["name"] == workload["metadata"]["name"]:
            must(reference["secretRef"]["name"] in names.get("Secret", set()), "the chart's Secret does not exist")
    must(pod["serviceAccountName"] in names.get("ServiceAccount", {"default"}), "the ServiceAccount does not exist")
    own = {document["metadata"]["name"] for document in found if document["kind"] in ("ConfigMap", "Secret", "ServiceAccount")}
    for hook in found:
        if "pre-install" in hook["metadata"].get("annotations", {}).get("helm.sh/hook", ""):
            used = re.findall(r'"(?:configMapRef|secretRef|secretKeyRef)": \{"name": "([^"]+)"|"(?:secretName|serviceAccountName)": "([^"]+)"', json.dumps(hook["spec"]))
            must(not own & {name for pair in used for name in pair}, "a hook uses what does not exist yet")
            # The hook's server has the memory limit of the release's, so it needs the same precision.
            loads = {variable["name"]: variable.get("value") for variable in hook["spec"]["template"]["spec"]["initContainers"][0]["env"]}
            must(loads.get("BRADLEY_PRECISION") == config.get("BRADLEY_PRECISION"), "a hook loads the models in another precision")
    # Files that settings name are mounted.
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    mounted = {f"{mounts[volume['name']]}/{item['path']}" for volume in pod["volumes"] for item in volume.get("secret", {}).get("items", [])}
    for setting, value in config.items():
        must(not value.startswith("/etc/bradley/") or value in mounted, f"{setting} names a file that is not mounted")
    if "BRADLEY_TLS_CERT" in config:
        (test,) = by_kind["Pod"]
        environment = {variable["name"]: variable["value"] for variable in test["spec"]["containers"][0]["env"]}
        must(environment["BRADLEY_SERVER"].startswith("https://") and "BRADLEY_TLS_SERVER_CA" in environment, "helm test does not trust the authority")
        must("BRADLEY_TLS_CLIENT_CA" not in config or "BRADLEY_TLS_CLIENT_CERT" in environment, "helm test has no client certificate")
        keys = [item["key"] for volume in test["spec"]["volumes"] if volume["name"] == "ca" for item in volume["secret"]["items"]]
        must("tls.key" not in keys, "helm test has the server's key")
        # Commands in the server's pod need the authority. The pod starts without that key, too: a Secret of the type kubernetes.io/tls need not have it.
        tls = values["tls"]
        authority = {
            "secretName": tls.get("existingSecret") or f"{workload['metadata']['name']}-tls",
            "defaultMode": 0o440,
            "optional": True,
            "items": [{"key": tls.get("caKey", "ca.crt") if tls.get("existingSecret") else "ca.crt", "path": "ca.crt"}],
        }
        trusted = [volume["secret"] for volume in pod["volumes"] if mounts.get(volume["name"]) == "/etc/bradley/server-ca"]
        must(trusted == [authority], "the server's pod lacks the authority of its certificate")


# -- mutations of manifests -----------------------------------------------------------------------------------------------------------

# Maps whose keys are free names: a misspelt key is no error there.
FREE = {
    "labels", "annotations", "data", "stringData", "matchLabels", "selector", "nodeSelector", "limits", "requests", "metadata.trigger", "groups.labels",
}  # fmt: skip


def places(node, path=()):
    """Yields the paths of all objects whose fields a schema defines."""
    if isinstance(node, dict):
        # Services select by a map of labels, others by an object.
        free = path and (path[-1] in FREE - {"selector"} or (path[-1] == "selector" and "matchLabels" not in node and "matchExpressions" not in node))
        if free or (len(path) > 2 and path[-1] == "metadata" and path[-3] == "triggers"):
            return
        yield path
        for key, value in node.items():
            yield from places(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from places(value, (*path, i))


def mutations():
    newest, seen, core, custom = KUBERNETES[-1], set(), 0, []
    every = [document for text in rendered([newest]).values() for document in documents(text) if not document["apiVersion"].startswith(UNKNOWN)]
    for document in every:
        for path in places(document):
            place = (document["kind"], tuple(key for key in path if isinstance(key, str)))
            if place in seen:
                continue
            seen.add(place)
            wrong = copy.deepcopy(document)
            at(wrong, path)["misspelt"] = "x"
            where = f"{document['kind']}: a misspelt field in {'.'.join(map(str, path)) or 'it'} was not found"
            if is_custom(document):
                custom.append((wrong, where))
            else:
                core += 1
                check(any("misspelt" in message for message in findings(wrong, newest)), where)
    for (_, where), found in zip(custom, custom_findings([wrong for wrong, _ in custom])):
        check(any("misspelt" in message for message in found), where)

    # Wrong values of custom resources, which the compiler cannot see.
    example = {document["kind"]: document for document in every if is_custom(document)}
    bad = []
    for kind, path, value in (
        ("ServiceMonitor", ("spec", "endpoints", 0, "interval"), "1 parsec"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "interval"), "1 parsec"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "for"), "1 parsec"),
        ("ScaledObject", ("spec", "maxReplicaCount"), 1.5),
        ("GRPCRoute", ("spec", "hostnames", 0), "not a host"),
    ):
        wrong = copy.deepcopy(example[kind])
        at(wrong, path[:-1])[path[-1]] = value
        bad.append(wrong)
    for wrong, found in zip(bad, custom_findings(bad)):
        check(found, f"{wrong['kind']}: a wrong value was not found")
    print(f"misspelt fields at {core} places of manifests and {len(custom)} of custom resources, {len(bad)} wrong values")


# -- policies -------------------------------------------------------------------------------------------------------------------------


def policies():
    folder = pathlib.Path(os.environ["RENDERED"]) / KUBERNETES[-1]
    command = (os.environ["CHECKOV"], "--framework", "kubernetes", "--directory", folder, "--output", "json", "--skip-download")
    result = run(*command)
    try:
        report = json.loads(result.stdout)
        found, summary = report["results"]["failed_checks"], report["summary"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise RuntimeError(f"checkov: {result.stdout[-2000:]}{result.stderr[-2000:]}") from None
    exceptions, used = yaml.safe_load((CI / "checkov.yaml").read_text()), set()
    for failed in found:
        excusing = {
            i
            for i, e in enumerate(exceptions)
            if e["check"] == failed["check_id"] and e["reason"] and re.search(e.get("resource", ""), failed["resource"]) and re.search(e.get("file", ""), failed["file_path"])
        }
        used |= excusing
        check(excusing, f"{failed['check_id']} {failed['check_name']}: {failed['resource']} in {failed['file_path']}")
    for i, exception in enumerate(exceptions):
        check(i in used, f"ci/checkov.yaml: the exception of {exception['check']} excuses nothing")
    check(summary["passed"] > 500 and not summary["parsing_errors"], f"checkov looked at too little: {summary}")
    print(f"checkov {summary['checkov_version']}: {summary['passed']} passed, {len(found)} found, all but {len(failures)} excused by {len(exceptions)} exceptions")


COMMANDS = {"docs": docs, "lint": lint, "refused": refused, "memory": memory, "manifests": manifests, "mutations": mutations, "policies": policies}

if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    COMMANDS[command](*(argument == "--write" for argument in rest))
    if failures:
        sys.exit(f"{len(failures)} failed")
