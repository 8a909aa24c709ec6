"""A ClearML task whose calls all run on one daemon thread, so that no server can block training."""

import atexit
import copy
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import EnvironmentFault, UserError, say
from common.text import command, printable

PROJECT = "Vision MoE"
PROBE_SECONDS = 3.0
CLOSE_SECONDS = 30.0  # timeout at the end for a server that does not answer
MODEL, FRAMEWORK = "output model", "PyTorch"  # marks of an artifact, offline
FAILED = "failed"  # the tag of a failed run, offline
UPLOAD_SECONDS = 600.0  # timeout for a server that answers, or the disk


class ClearMLTask:
    """A ClearML task and the only thread that uses it; a job is a function of the task."""

    lost = False  # whether this process has an unfinished task: the SDK allows one

    def __init__(
        self,
        mode: str,
        config: dict,
        name: str,
        tags: list[str],
        task_id: str | None = None,
        kind: str = "training",
        parent: str | None = None,
    ):
        """Start the task, mode "clearml" or "offline". task_id: continue this one, if online and it exists.

        kind: ClearML's task type. parent: id of the parent task. Raises UserError and
        EnvironmentFault.
        """
        if self.lost:
            raise EnvironmentFault("ClearML has hung in this process and can only be used in a new one")
        if problem := server_problem() if mode == "clearml" else None:
            raise problem
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        started, error = attempt(_start_task, mode == "offline", config, name, tags, task_id, kind, parent)
        # The SDK's handlers turn a segmentation fault into an endless loop, hang on SIGTERM when the server
        # is dead and, closed from a thread, stay and swallow Ctrl-C.
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        if error is not None:
            attempt(_abandon)
            raise _explain(error) from error
        self.whole = False  # whether all jobs were done, known at the end
        self.mode, self.task = mode, started
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="clearml", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def place(self) -> dict[str, str]:
        """The location of the task: its web page, or the file of its offline session."""
        folder = self.task.get_offline_mode_folder()
        return {"session": f"{folder}.zip"} if folder else {"page": self.task.get_output_log_web_page()}

    def _work(self) -> None:
        complained = False
        for job, args in iter(self.jobs.get, None):
            _, error = attempt(job, self.task, *args)
            if error is not None and not complained:
                text = f"tracking: ClearML failed ({type(error).__name__}: {error}); training continues"
                say(text + ", and metrics.jsonl has every number")
            complained = complained or error is not None
        self.whole = not complained

    def close(self, failed: str | None = None) -> bool:
        """Send the rest and close the task; whether everything arrived. Waits CLOSE_SECONDS for a dead server."""
        atexit.unregister(self.close)
        self.jobs.put((_finish, (failed,)))
        self.jobs.put(None)
        start = time.monotonic()
        while self._thread.join(CLOSE_SECONDS) or self._thread.is_alive():
            problem = server_problem() if self.mode == "clearml" else None
            if problem or time.monotonic() - start > UPLOAD_SECONDS:
                say(f"tracking: ClearML was closed before it had finished ({problem or 'too slow'})")
                attempt(_disown, self.task)
                return False
        return self.whole


def attempt(function: Callable, *args: Any, **options: Any) -> tuple[Any, Exception | None]:
    """The function's result, or the exception it raised: the SDK may raise anything, and none may stop training."""
    try:
        return function(*args, **options), None
    except Exception as error:
        return None, error


def _explain(error: Exception) -> UserError:
    """The user error for an exception that the SDK raised at start-up."""
    kind = UserError if type(error).__name__ in ("LoginError", "ConfigurationError") else EnvironmentFault
    return kind(f"ClearML cannot start: {type(error).__name__}: {' '.join(str(error).split())}")


def _start_task(
    offline: bool, config: dict, name: str, tags: list, task_id: str | None, kind: str, parent: str | None
) -> Any:
    """Start the SDK's task, with the configuration as hyperparameters. Raises the exceptions of the SDK."""
    from clearml import Task
    from clearml.backend_api.session.defs import ENV_OFFLINE_MODE
    from clearml.config import ConfigSDKWrapper, config_obj

    # The default, reporting from a forked process, copies one that may hold CUDA, takes 9 ms a scalar and
    # seconds to close. A clearml.conf that asks for it gets it.
    if config_obj.get("sdk.development.report_use_subprocess", None) is None:
        config_obj.set_overrides({"sdk": {"development": {"report_use_subprocess": False}}})
        ConfigSDKWrapper.clear_config_impl()
    environment = os.environ.copy()
    Task.set_offline(offline)  # going online logs in at once, so only after the probe
    ENV_OFFLINE_MODE.pop()  # the SDK sets variables that would make every later run offline
    os.environ.update(environment)
    go_on = bool(task_id) and not offline and not task_id.startswith("offline-")
    task = Task.init(
        project_name=PROJECT,
        task_name=name,
        task_type=kind,
        tags=tags or None,
        reuse_last_task_id=False,
        continue_last_task=task_id if go_on else False,
        output_uri=None if offline else True,
        auto_connect_arg_parser=False,
        auto_connect_frameworks={"pytorch": False, "matplotlib": False},
        auto_resource_monitoring=not offline,
    )
    if go_on:
        task.set_initial_iteration(0)  # steps count from the start of the run, not from where it was resumed
    if parent and not offline:
        task.set_parent(parent)
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    general = {key: value for key, value in config.items() if key not in sections}
    for section, values in (sections | ({"General": general} if general else {})).items():
        # Under an agent the SDK writes the task's values into this copy; see tracking.agent.
        task.connect(copy.deepcopy(values), name=section)
    return task


def _abandon() -> None:
    """Close a task whose start failed: the SDK allows one task per process."""
    from clearml import Task

    if task := Task.current_task():
        thread = threading.Thread(target=attempt, args=(task.close,), daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            _disown(task)


def _disown(task: Any) -> None:
    """Remove the SDK's exit handlers: each of them may wait forever for a dead server."""
    from clearml.backend_interface.task.log import TaskHandler

    ClearMLTask.lost = True
    atexit.unregister(task._at_exit)
    atexit.unregister(task._reporter._handle_program_exit)
    TaskHandler.flush = TaskHandler.close = lambda handler: None


def show(task: Any, title: str, series: str, path: Path) -> None:
    """Report a PNG among the debug samples. Raises OSError if it is missing, and what the SDK raises."""
    path.stat()  # the SDK silently skips a missing file
    task.get_logger().report_image(title, series, iteration=0, local_path=str(path))


def upload(task: Any, name: str, path: Path, labels: Sequence[str] | None = None) -> None:
    """Upload a file as artifact, or with the names of its classes as output model.

    Offline, the SDK cannot create an output model; it becomes an artifact that `tracking.send` turns into one. Raises
    OSError if that fails, and what the SDK raises.
    """
    from clearml import OutputModel

    path.stat()  # the SDK makes an empty archive for a missing file
    classes = {label: index for index, label in enumerate(labels or ())}
    if labels is not None and not task.get_offline_mode_folder():
        model = OutputModel(task=task, name=name, framework=FRAMEWORK, label_enumeration=classes)
        model.update_weights(str(path), auto_delete_file=False)
        return
    marks = None if labels is None else {MODEL: FRAMEWORK} | classes
    if not task.upload_artifact(name, path, metadata=marks, wait_on_upload=True):
        raise OSError(f"{path} was not uploaded")


def use_model(task: Any, parent: str) -> None:
    """Use the last output model of another task, if any, as this one's input model. Raises what the SDK raises."""
    from clearml import Task

    if task.get_offline_mode_folder():
        return
    models = Task.get_task(task_id=parent).models["output"]
    if models:
        task.set_input_model(model_id=models[-1].id)


def _finish(task: Any, failed: str | None) -> None:
    folder = task.get_offline_mode_folder()
    if failed and folder:
        task.add_tags([FAILED])  # importing a session marks it as completed in any case
        task.get_logger().report_text(f"failed: {failed}", print_console=False)
    task.close()
    if failed and not folder:
        task.mark_failed(status_reason=failed, status_message=failed, force=True)
    if folder:
        send = command("-m", "tracking.send", f"{folder}.zip")
        print(f"tracking: offline session {printable(folder)}.zip; send it to a server with: {send}")


def server_problem() -> UserError | None:
    """Why the configured ClearML server cannot be used, or None; it has PROBE_SECONDS + 1 to answer.

    Task.init would silently retry a dead server for hours. The request runs in a thread because socket timeouts do not
    cover name resolution or an answer that arrives byte by byte.
    """
    login, error = attempt(_login)  # outside the timeout: importing the SDK takes seconds
    if error is None:
        outcome: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=lambda: outcome.put(attempt(_ask, *login)), daemon=True).start()
        try:
            _, error = outcome.get(timeout=PROBE_SECONDS + 1)
        except queue.Empty:
            return EnvironmentFault(f"the ClearML server does not answer within {PROBE_SECONDS + 1:.0f} s")
    return error if error is None or isinstance(error, UserError) else _explain(error)


def _login() -> tuple[Any, str, dict[str, Any]]:
    """Session, host and options of the request that logs in to the configured server. Raises UserError."""
    from clearml.backend_api import Session
    from clearml.backend_api.session import defs
    from clearml.backend_api.utils import get_http_session_with_retry
    from clearml.config import config_obj

    if defs.ENV_OFFLINE_MODE.get():
        raise UserError("CLEARML_OFFLINE_MODE is set; unset it to use a server")
    token = defs.ENV_AUTH_TOKEN.get()
    access = defs.ENV_ACCESS_KEY.get(default=config_obj.get("api.credentials.access_key", None))
    secret = defs.ENV_SECRET_KEY.get(default=config_obj.get("api.credentials.secret_key", None))
    if not token and not (access and secret):
        raise UserError("no ClearML server is configured; run clearml-init")
    session = get_http_session_with_retry(config=config_obj)  # certificates as configured; no retries
    credentials = {"headers": {"Authorization": f"Bearer {token}"}} if token else {"auth": (access, secret)}
    return session, Session.get_api_server_host(), credentials


def _ask(session: Any, host: str, credentials: dict[str, Any]) -> None:
    """Log in, once. Raises UserError and EnvironmentFault."""
    try:
        answer = session.get(f"{host}/auth.login", timeout=PROBE_SECONDS, **credentials)
    except OSError as error:  # requests' exceptions are OSErrors
        reason = f"{host} does not answer ({type(error).__name__})"
        raise EnvironmentFault(f"the ClearML server {reason}; start it, or correct api_server") from error
    if answer.status_code in (401, 403):
        raise UserError(f"the ClearML server {host} refused the login; correct the access and secret key")
    if answer.status_code >= 500:
        raise EnvironmentFault(f"the ClearML server {host} has an internal error (HTTP {answer.status_code})")
