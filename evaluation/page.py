"""A local web page that classifies the images dropped on it; only this machine can open it, and it needs gradio."""

import os
import socket
import tempfile
from collections.abc import Callable
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from common.errors import EnvironmentFault, UserError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from matplotlib.figure import Figure

HOST = "127.0.0.1"
# The browser may not load anything from other sites or send anything there, even if gradio requests it.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
Ask = Callable[[Path], tuple[dict[str, Any], "Figure"]]
"""From an image file to its entry in --json and its figure. Raises UserError if it cannot be read."""


def require_gradio() -> None:
    """Import gradio with its analytics turned off. Raises EnvironmentFault if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # the history would keep the images in the browser
    try:
        import gradio
    except ImportError as error:
        raise EnvironmentFault("--serve needs gradio, which is not installed: pip install gradio") from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise EnvironmentFault(f"--serve needs gradio 6 or newer, not {gradio.__version__}: pip install -U gradio")


def listen(port: int) -> socket.socket:
    """A socket that listens on a port of this machine, 0 for any free port. Raises UserError if the port is in use."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise UserError(f"--port {port} cannot be used ({error.strerror}): choose another one") from error
    return listening


def serve(listening: socket.socket, title: str, ask: Ask) -> None:
    """Serve the page until a signal ends the program. The images of visitors are deleted at the end."""
    import uvicorn

    with tempfile.TemporaryDirectory(prefix="vision-moe-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when the page is built
        uvicorn.Server(uvicorn.Config(page(title, ask), log_level="warning", timeout_graceful_shutdown=1)).run(
            [listening]
        )


def page(title: str, ask: Ask) -> "FastAPI":
    """The page as an application. Input: a file. Output: classes, experts, figure, notes and the JSON entry."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    def answer(file: str):
        path = Path(file)
        try:
            row, figure = ask(path)
        except UserError as error:
            raise gr.Error(str(error).replace(file, path.name), duration=None, print_exception=False) from error
        row = {**row, "file": path.name}
        classes = {score["name"]: score["probability"] for score in row["classes"]}
        votes = [
            [vote["name"], f"{vote['weight']:.3f}", vote["alone"]["name"], f"{vote['alone']['probability']:.1%}"]
            for vote in row["experts"]
        ]
        return classes, votes, drawn(figure), remarks(row), row

    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>{escape(title)}</h1>")
        with gr.Row():
            image = gr.File(label="an image file")
            classes = gr.Label(label="classes")
        experts = gr.Dataframe(
            headers=["expert · hidden units", "gate weight", "its prediction", "probability"], label="experts"
        )
        shown = gr.Image(
            show_label=False, interactive=False, buttons=["fullscreen", "download"]
        )  # without a share button
        notes = gr.Textbox(label="remarks", interactive=False)
        with gr.Accordion("output of --json", open=False):
            entry = gr.JSON(show_label=False)
        image.upload(answer, image, [classes, experts, shown, notes, entry], api_name="answer")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def with_policy(request, answered):
        response = await answered(request)
        response.headers["content-security-policy"] = POLICY
        return response

    app.add_middleware(
        TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]
    )  # rejects other host names for this address
    return gr.mount_gradio_app(app, blocks, path="/", ssr_mode=False, mcp_server=False, enable_monitoring=False)


def drawn(figure: "Figure") -> Image.Image:
    """A figure as an image."""
    with BytesIO() as content:
        figure.savefig(content, format="png", dpi=150)
        return Image.open(content).convert("RGB")


def remarks(row: dict[str, Any]) -> str:
    """Notes on how the file was read, and whether the image is unlike the training images."""
    unlike = ["rejected: unlike the training images"] if row.get("rejected") else []
    return "; ".join([*unlike, *row["notes"]])
