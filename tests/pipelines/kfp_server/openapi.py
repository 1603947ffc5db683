"""The KFP v2 API as `kfp-server-api` publishes it: operations and schemas, read from the generated client itself.

The client is generated from the published OpenAPI file and carries all of it: paths and methods, query parameters
with their types, bodies, answers, and each model's fields. So the server checks against the version that is installed.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import kfp_server_api
from jsonschema import Draft202012Validator, FormatChecker

SERVICES = (
    kfp_server_api.RunServiceApi,
    kfp_server_api.RecurringRunServiceApi,
    kfp_server_api.ExperimentServiceApi,
    kfp_server_api.PipelineServiceApi,
    kfp_server_api.PipelineUploadServiceApi,
    kfp_server_api.HealthzServiceApi,
)
_PRIMITIVES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


@dataclass(frozen=True)
class Operation:
    """One operation of the API.

    Attributes:
        name: of the generated function, ``run_service_create_run``.
        method: HTTP method.
        path: with ``{names}`` in braces.
        query: type of every query parameter, as the client writes it.
        body: type of the JSON body; empty where there is none.
        upload: whether the body is a multipart form with a file.
        answer: type of the answer.
    """

    name: str
    method: str
    path: str
    query: Mapping[str, str]
    body: str
    upload: bool
    answer: str
    pattern: re.Pattern[str] = field(repr=False, compare=False)


@cache
def operations() -> tuple[Operation, ...]:
    """Every operation of :data:`SERVICES`; those with fixed paths come before those with names in them."""
    found = [each for service in SERVICES for each in _operations(service)]
    return tuple(sorted(found, key=lambda each: (each.path.count("{"), each.path)))


def find(method: str, path: str) -> tuple[Operation, dict[str, str]] | None:
    """The operation for a request, and what stands in its path."""
    for each in operations():
        match = each.pattern.fullmatch(path) if each.method == method else None
        if match:
            return each, match.groupdict()
    return None


def problems(value: Any, kind: str) -> list[str]:
    """What is wrong with ``value`` as a ``kind``, a type as the client writes it; empty: nothing."""
    return [f"{each.json_path}: {each.message}" for each in _validator(kind).iter_errors(value)]


def query_problems(operation: Operation, query: Mapping[str, str]) -> list[str]:
    """What is wrong with the query of a request."""
    found = []
    for name, text in query.items():
        kind = operation.query.get(name)
        if kind is None:
            found.append(f"query parameter {name} is not known")
        elif kind == "int" and not re.fullmatch(r"-?[0-9]+", text):
            found.append(f"query parameter {name} is no number: {text!r}")
        elif kind == "bool" and text not in ("true", "false"):
            found.append(f"query parameter {name} is no boolean: {text!r}")
        elif kind not in _PRIMITIVES:
            found += [f"query parameter {name}: {each}" for each in problems(text, kind)]
    return found


@cache
def _validator(kind: str) -> Draft202012Validator:
    names: set[str] = set()
    schema = _schema(kind, names)
    definitions: dict[str, Any] = {}
    while names - set(definitions):
        name = (names - set(definitions)).pop()
        definitions[name] = _model(name, names)
    return Draft202012Validator({**schema, "$defs": definitions}, format_checker=FormatChecker())


def _schema(kind: str, names: set[str]) -> dict[str, Any]:
    if kind in _PRIMITIVES:
        return {"type": _PRIMITIVES[kind]}
    if kind == "datetime":
        return {"type": "string", "format": "date-time", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"}
    if kind == "object":
        return {}
    listed = re.fullmatch(r"list\[(.+)\]", kind)
    if listed:
        return {"type": "array", "items": _schema(listed[1], names)}
    mapped = re.fullmatch(r"dict\(str, (.+)\)", kind)
    if mapped:
        return {"type": "object", "additionalProperties": _schema(mapped[1], names)}
    names.add(kind)
    return {"$ref": f"#/$defs/{kind}"}


def _model(name: str, names: set[str]) -> dict[str, Any]:
    model = getattr(kfp_server_api, name)
    if hasattr(model, "allowable_values"):
        return {"enum": list(model.allowable_values)}
    types, keys = model.openapi_types, model.attribute_map
    properties = {keys[attribute]: _schema(kind, names) for attribute, kind in types.items()}
    # Any carries further fields by definition; everything else is closed.
    return {"type": "object", "properties": properties, "additionalProperties": name == "ProtobufAny"}


def _operations(service: type) -> Iterator[Operation]:
    for name, function in inspect.getmembers(service, inspect.isfunction):
        if not name.endswith("_with_http_info"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(function)))
        call = next(node for node in ast.walk(body) if isinstance(node, ast.Call) and _called(node) == "call_api")
        path, method = (ast.literal_eval(each) for each in call.args[:2])
        named = {each.arg: each.value for each in call.keywords}
        answer = named["response_type"]
        types = dict(re.findall(r":type (\w+): ([^\n,]+)", inspect.getdoc(function) or ""))
        source = inspect.getsource(function)
        in_body = re.search(r"body_params = local_var_params\['(\w+)'\]", source)
        names = re.findall(r"query_params\.append\(\('([\w.]+)'", source)
        attributes = re.findall(r"query_params\.append\(\('[\w.]+', local_var_params\['(\w+)'\]", source)
        pattern = re.sub(
            r"\\\{([\w.]+)\\\}", lambda found: f"(?P<{found[1].replace('.', '_')}>[^/:]+)", re.escape(path)
        )
        yield Operation(
            name=name.removesuffix("_with_http_info"),
            method=method,
            path=path,
            query={key: types[attribute].strip() for key, attribute in zip(names, attributes, strict=True)},
            body=types[in_body[1]].strip() if in_body else "",
            upload="local_var_files['" in source,
            answer=str(ast.literal_eval(answer)),
            pattern=re.compile(pattern),
        )


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else ""
