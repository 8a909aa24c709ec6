"""A ClearML server on the loopback interface: the API and file server that the SDK needs, with data in dictionaries.

It rejects requests that the published API does not allow.

`with StandIn() as server: run_python(workplace, run, code, **server.environment())`, then look at what it holds.
"""

import base64
import copy
import hashlib
import json
import re
import threading
import time
import uuid
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from clearml_schema import complaint


def _part(value: dict) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


# The SDK reads the payload without checking the signature, which must still be base64.
CLAIMS = {"exp": 9e9, "iat": 1, "api_version": "2.30", "server_version": "2.0", "feature_set": "basic"}
TOKEN = ".".join(_part(part) for part in ({"alg": "HS256"}, CLAIMS, {}))


NOW = "2026-01-01T00:00:00.000000+00:00"
STATES = {
    "started": "in_progress",
    "completed": "completed",
    "stopped": "stopped",
    "failed": "failed",
    "publish": "published",
    "enqueue": "queued",
    "dequeue": "created",
}
CLONED = ("type", "project", "script", "hyperparams", "configuration", "comment", "tags", "execution")
QUEUES = ("default", "gpu")


class StandIn:
    """The server. refuse: answers every login with 401. die: from now on no request is answered ("hang"), or none is
    accepted ("refuse")."""

    def __init__(self, refuse: bool = False):
        self.refuse = refuse
        self.hanging = threading.Event()
        self.tasks: dict[str, dict] = {}
        self.models: dict[str, dict] = {}
        self.projects: dict[str, dict] = {}
        self.events: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.misfits: list[str] = []  # requests that the published API does not allow
        self._lock = threading.Lock()

    def __enter__(self) -> "StandIn":
        handler = type("Handler", (_Handler,), {"standin": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that has disconnected
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.hanging.clear()
        self.die("refuse")
        assert exception != (None, None, None) or not self.misfits, self.misfits

    def die(self, how: str) -> None:
        if how == "hang":
            self.hanging.set()
        else:
            self._server.shutdown()
            self._server.server_close()

    def environment(self) -> dict[str, str]:
        """The environment variables that make the SDK of another process use this server."""
        return {
            "CLEARML_API_HOST": self.url,
            "CLEARML_WEB_HOST": self.url,
            "CLEARML_FILES_HOST": f"{self.url}/files",
            "CLEARML_API_ACCESS_KEY": "key",
            "CLEARML_API_SECRET_KEY": "secret",
        }

    def call(self, endpoint: str, body) -> dict:
        """The data that an endpoint answers with. Raises KeyError for an unknown task or model."""
        service, _, action = endpoint.partition(".")
        with self._lock:
            self.calls.append(endpoint)
            if service == "events":
                return self._events(action, body)
            if service == "queues":
                return {
                    "queues": [{"id": f"queue-{name}", "name": name} for name in QUEUES if self._wanted(name, body)]
                }
            if service == "workers":
                return {"workers": []}
            store = {"tasks": self.tasks, "models": self.models, "projects": self.projects}.get(service, {})
            return self._item(store, action, body)

    def _item(self, store: dict, action: str, body: dict) -> dict:
        name = {id(self.tasks): "task", id(self.models): "model", id(self.projects): "project"}.get(id(store), "item")
        if action in ("create", "edit_or_create"):
            item = {"id": uuid.uuid4().hex, "status": "created", "created": NOW, "last_update": NOW, **body}
            if name == "task":
                item = {"output": {"result": "", "error": ""}, "execution": {"artifacts": []}, "script": {}} | item
            store[item["id"]] = item
            return {"id": item["id"]}
        if action.startswith("get_all"):
            wanted = body.get("id")
            found = [item for item in store.values() if wanted is None or item["id"] in wanted]
            for field in ("parent", "status"):
                if sought := body.get(field):
                    sought = sought if isinstance(sought, list) else [sought]
                    found = [item for item in found if item.get(field) in sought]
            if name == "task":
                found = [self._seen(item) for item in found]
            if tasks := body.get("task"):
                found = [item for item in found if item.get("task") in tasks]
            found = [item for item in found if self._wanted(item["name"], body)]
            return {f"{name}s": found}
        item = store[body.get(name) or body.get("id") or body.get("model")]
        if action == "clone":
            new = {key: copy.deepcopy(item[key]) for key in CLONED if key in item}
            new |= {key.removeprefix("new_task_"): value for key, value in body.items() if key.startswith("new_task_")}
            return self._item(store, "create", new)
        if action == "get_by_id":
            return {name: self._seen(item) if name == "task" else item}
        if action in STATES:
            item["status"] = STATES[action]
            if action in ("started", "completed"):
                item[action] = NOW
            item["status_reason"] = body.get("status_reason", "")
        elif action == "edit_hyper_params":
            for value in body["hyperparams"]:
                item.setdefault("hyperparams", {}).setdefault(value["section"], {})[value["name"]] = value
        elif action == "edit_configuration":
            for value in body["configuration"]:
                item.setdefault("configuration", {})[value["name"]] = value
        elif action == "add_or_update_artifacts":
            held = item.setdefault("execution", {}).setdefault("artifacts", [])
            keys = {artifact["key"] for artifact in body["artifacts"]}
            held[:] = [artifact for artifact in held if artifact["key"] not in keys] + body["artifacts"]
        elif action == "add_or_update_model":
            held = item.setdefault("models", {}).setdefault(body["type"], [])
            held.append({"name": body["name"], "model": body["model"]})
        elif action in ("edit", "update"):
            item |= {key: value for key, value in body.items() if key not in (name, "force")}
        return {"updated": 1, "fields": {}}

    @staticmethod
    def _wanted(name: str, body: dict) -> bool:
        return re.fullmatch(body.get("name") or ".*", name) is not None

    def _seen(self, task: dict) -> dict:
        """A task, and of each of its scalars the last, least and largest value, by hashes of title and series."""
        metrics: dict[str, dict] = {}
        for (title, series, _), value in sorted(self.scalars(task["id"]).items(), key=lambda item: item[0][2]):
            hashed = [hashlib.md5(text.encode()).hexdigest() for text in (title, series)]
            last = metrics.setdefault(hashed[0], {}).setdefault(hashed[1], {"metric": title, "variant": series})
            last |= {"value": value, "min_value": min(value, last.get("min_value", value))}
            last["max_value"] = max(value, last.get("max_value", value))
        return {**task, "last_metrics": metrics}

    def _events(self, action: str, body) -> dict:
        if action == "add_batch":
            self.events += body
            return {"added": len(body), "errors": 0, "errors_info": {}}
        if action == "get_task_single_value_metrics":
            values = [
                {"metric": event["metric"], "variant": event["variant"], "value": event["value"]}
                for event in self.events
                if event["task"] in body["tasks"] and event.get("metric") == "Summary"
            ]
            return {"tasks": [{"task": body["tasks"][0], "values": values}]}
        if action == "scalar_metrics_iter_histogram":
            curves: dict[str, dict] = {}
            for (title, series, step), value in sorted(self.scalars(body["task"]).items(), key=lambda item: item[0][2]):
                curve = curves.setdefault(title, {}).setdefault(series, {"name": series, "x": [], "y": []})
                curve["x"].append(step)
                curve["y"].append(value)
            return curves
        return {}

    def scalars(self, task: str) -> dict[tuple[str, str, int], float]:
        """(title, series, step) -> value, single values under the title Summary; without the SDK's monitor."""
        return {
            (event["metric"], event["variant"], event["iter"]): event["value"]
            for event in self.events
            if event["type"] == "training_stats_scalar" and event["task"] == task and event["metric"][0] != ":"
        }


class _Handler(BaseHTTPRequestHandler):
    standin: StandIn
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        while self.standin.hanging.is_set():
            time.sleep(0.05)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0]).replace("//", "/")
        if path.startswith("/files"):
            self._file(path, content)
            return
        endpoint = path.rsplit("/", 1)[-1]
        if endpoint.startswith("standin.die_"):  # called by the process of a test
            self._send(200, b"{}")
            threading.Thread(target=self.standin.die, args=(endpoint.removeprefix("standin.die_"),)).start()
            return
        if endpoint == "auth.login" and self.standin.refuse:
            self._send(401, self._envelope(endpoint, 401, "Unauthorized (invalid credentials)", {}))
            return
        try:
            if endpoint == "auth.login":
                data = {"token": TOKEN}
            else:
                body = self._body(content)
                if reason := complaint(endpoint, body):
                    self.standin.misfits.append(f"{endpoint}: {reason}")
                    self._send(400, self._envelope(endpoint, 400, f"Validation error ({reason})", {}))
                    return
                data = self.standin.call(endpoint, body)
            self._send(200, self._envelope(endpoint, 200, "OK", data))
        except KeyError as error:
            self._send(400, self._envelope(endpoint, 400, f"Invalid id {error}", {}))

    do_GET = do_POST = do_PUT = _answer

    def _body(self, content: bytes):
        if "json-lines" in self.headers.get("Content-Type", ""):
            return [json.loads(line) for line in content.splitlines()]
        return json.loads(content or b"{}")

    def _file(self, path: str, content: bytes) -> None:
        if self.command == "GET":
            found = self.standin.files.get(path)
            self._send(404 if found is None else 200, found or b"")
            return
        message = message_from_bytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\n\n" + content)
        for part in message.get_payload() if message.is_multipart() else []:
            name = part.get_param("filename", header="Content-Disposition") or part.get_param(
                "name", header="Content-Disposition"
            )
            self.standin.files[f"/files/{unquote(name)}".replace("//", "/")] = part.get_payload(decode=True)
        self._send(200, b"{}")

    @staticmethod
    def _envelope(endpoint: str, code: int, message: str, data: dict) -> bytes:
        meta = {
            "id": uuid.uuid4().hex,
            "endpoint": {"name": endpoint, "requested_version": "2.30", "actual_version": "2.30"},
            "result_code": code,
            "result_subcode": 0 if code == 200 else 100,
            "result_msg": message,
        }
        return json.dumps({"meta": meta, "data": data}).encode()

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass
