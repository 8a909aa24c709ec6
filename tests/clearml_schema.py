"""The published API of a ClearML server, from the SDK."""

import importlib
from functools import cache
from typing import Any

SERVICES = ("auth", "events", "models", "organization", "projects", "queues", "tasks", "workers")


@cache
def _classes() -> tuple[dict[str, type], dict[str, type]]:
    """The class of each request by endpoint, and of each event by type."""
    from clearml.backend_api.session import Request

    requests, events = {}, {}
    for service in SERVICES:
        module = importlib.import_module(f"clearml.backend_api.services.v2_23.{service}")
        for found in vars(module).values():
            if isinstance(found, type) and issubclass(found, Request) and getattr(found, "_action", None):
                requests[f"{found._service}.{found._action}"] = found
            kind = (getattr(found, "_schema", None) or {}).get("properties", {}).get("type", {})
            if service == "events" and isinstance(found, type) and "const" in kind:
                events[kind["const"]] = found
    return requests, events


def complaint(endpoint: str, body: Any) -> str:
    """The violations of an endpoint's schema in a request; empty if there are none."""
    requests, events = _classes()
    if endpoint not in requests:
        return f"there is no endpoint {endpoint}"
    if endpoint != "events.add_batch":
        return _misfit(requests[endpoint], body)
    for event in body:
        kind = events.get(event.get("type"))
        if reason := _misfit(kind, event, requests["events.add"]) if kind else f"an event of type {event.get('type')}":
            return reason
    return ""


def _misfit(kind: Any, values: dict[str, Any], parent: Any = None) -> str:
    """parent: the request whose definitions hold. Fields that a schema does not know are allowed, as servers do."""
    import jsonschema

    schema = {"definitions": (parent or kind)._schema.get("definitions", {})} | kind._schema
    error = next(jsonschema.Draft7Validator(schema).iter_errors(values), None)
    return "" if error is None else f"{kind.__name__}, {'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
