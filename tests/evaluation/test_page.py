"""The page of predict.py --serve: it shows the same as --json, only on this machine."""

import errno
import json
import os
import shutil
import signal
import socket
import sys
from subprocess import PIPE
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import pytest
from conftest import running_program
from picture_helpers import square
from PIL import Image

import predict
from assembly.loading import load_trained
from common.errors import UserError, exit_code_of
from evaluation.page import listen, remarks, require_gradio
from evaluation.predict_options import PORT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def run(monkeypatch, capsys, *words):
    """Exit code, standard output, lines of standard error."""
    monkeypatch.setattr("sys.argv", ["predict.py", *map(str, words)])
    code = exit_code_of(predict.main)
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


@pytest.fixture
def deep(tmp_path):
    """A file that a browser cannot show, and that must reach the model unchanged: 16 bits per pixel, not square."""
    values = np.random.default_rng(0).integers(0, 2**16, (40, 60)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.tif")
    return tmp_path / "deep.tif"


@pytest.mark.parametrize("options", [(), ("--top", "3")])
def test_the_page_gives_the_same_result_as_json(tiny_run, deep, tmp_path, monkeypatch, capsys, options):
    square(50).save(tmp_path / "colour.jpg")
    code, out, _ = run(monkeypatch, capsys, tiny_run, deep, tmp_path / "colour.jpg", "--json", *options)
    ask = predict.answerer(load_trained(tiny_run, "cpu"), int(options[1]) if options else 5)
    rows = json.loads(out)["images"]
    for path, row in zip((deep, tmp_path / "colour.jpg"), rows, strict=True):
        entry, figure = ask(path)
        assert set(entry) == set(row)
        for key in ("file", "notes"):
            assert entry[key] == row[key]
        for mine, printed in zip(entry["classes"], row["classes"], strict=True):
            assert mine == {"name": printed["name"], "probability": pytest.approx(printed["probability"], abs=1e-6)}
        votes = {vote["name"]: (vote["weight"], vote["alone"]["name"]) for vote in row["experts"]}
        for vote in entry["experts"]:
            weight, alone = votes[vote["name"]]
            assert vote["weight"] == pytest.approx(weight, abs=1e-6) and vote["alone"]["name"] == alone
        assert path.name in [axes.get_title() for axes in figure.axes]
    assert code == 0


def test_notes_report_unlike_images_and_how_the_file_was_read():
    assert remarks({"notes": []}) == remarks({"notes": [], "rejected": False}) == ""
    assert remarks({"notes": ["first of 2 frames"], "rejected": True}) == (
        "rejected: unlike the training images; first of 2 frames"
    )


def test_mistakes_are_reported_in_one_line(tiny_run, tmp_path, monkeypatch, capsys):
    def mistake(*words, expected=2):
        code, out, err = run(monkeypatch, capsys, tiny_run, *words)
        assert code == expected and out == "" and len(err) == 1, (code, out, err)
        return err[0]

    for words in ([tmp_path / "a.png"], ["--json"], ["--explain", tmp_path / "out.png"]):
        assert "--serve gets its images from the web page" in mistake("--serve", *words)
    assert "--port is for --serve" in mistake(tmp_path / "a.png", "--port", "8000")
    assert "--port is 70000" in mistake("--serve", "--port", "70000")
    assert "--port is 'x': give a whole number" in mistake("--serve", "--port", "x")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gradio", None)  # as if it were not installed
        assert "needs gradio, which is not installed: pip install gradio" in mistake("--serve", expected=1)
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="5.49.1"))
    assert "needs gradio 6 or newer, not 5.49.1" in mistake("--serve", expected=1)
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="6.0.0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = mistake("--serve", "--port", port)
        assert line == f"error: --port {port} cannot be used ({os.strerror(errno.EADDRINUSE)}): choose another one"


def test_images_can_come_before_and_after_options():
    for words in (
        "RUN a.png b.png --top 3",
        "RUN --top 3 a.png b.png",
        "RUN a.png --top 3 b.png",
        "--top 3 RUN a.png b.png",
    ):
        options = predict.parse(words.split())
        assert (str(options.run), [str(path) for path in options.images]) == ("RUN", ["a.png", "b.png"])
    assert predict.parse(["RUN", "--serve"]).images == [] and predict.parse(["--serve", "RUN"]).port == PORT


def test_a_port_is_released_and_only_local():
    with listen(0) as first:
        host, port = first.getsockname()
        with pytest.raises(UserError, match=f"--port {port} cannot be used"):
            listen(port)
    assert host == "127.0.0.1"
    listen(port).close()


def test_gradio_analytics_are_off(monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.setenv("GRADIO_RUN_HISTORY", "True")
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="6.0.0"))
    require_gradio()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == os.environ["GRADIO_RUN_HISTORY"] == "False"


@pytest.fixture
def served(tiny_run, tmp_path, monkeypatch):
    """The address of a page served by a program; afterwards Ctrl-C ends it, and no image remains."""
    pytest.importorskip("gradio")
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("NO_PROXY", "*")
    words = (tiny_run, "--serve", "--port", 0, "--device", "cpu")
    with running_program("predict.py", *words, stderr=PIPE) as process:
        line = process.stderr.readline()
        assert line.startswith("open http://127.0.0.1:"), line + process.stderr.read()
        yield line.split()[1]
        assert list(folder.glob("vision-moe-page-*"))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "interrupted by SIGINT\n"
    assert not list(folder.glob("vision-moe-page-*"))


@pytest.mark.slow
def test_the_page_answers_over_http_as_json_does(served, tiny_run, deep, tmp_path, monkeypatch, capsys):
    from gradio_client import Client, exceptions, handle_file

    code, out, _ = run(monkeypatch, capsys, tiny_run, deep, "--json", "--device", "cpu")
    (expected,) = json.loads(out)["images"]
    client = Client(served, verbose=False, analytics_enabled=False, download_files=str(tmp_path / "got"))
    label, table, picture, notes, entry = client.predict(handle_file(str(deep)), api_name="/answer")
    assert code == 0 and [row[0] for row in table["data"]] == [vote["name"] for vote in expected["experts"]]
    shown = [score["confidence"] for score in label["confidences"]]
    printed = [score["probability"] for score in expected["classes"]]
    assert shown == [score["probability"] for score in entry["classes"]] == pytest.approx(printed, abs=1e-6)
    assert label["label"] == expected["classes"][0]["name"]
    assert (entry["file"], [notes]) == ("deep.tif", expected["notes"])
    with Image.open(picture) as drawn:
        assert drawn.width > 1000

    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(exceptions.AppError, match=r"^text\.png cannot be read as an image"):
        client.predict(handle_file(str(tmp_path / "text.png")), api_name="/answer")

    opener = build_opener(ProxyHandler({}))
    with opener.open(served) as answer:
        assert answer.headers["content-security-policy"].startswith("default-src 'self' ")
    with pytest.raises(HTTPError, match="400"):  # another host name for this address
        opener.open(Request(served, headers={"Host": "example.org"}))


@pytest.mark.slow
def test_a_browser_shows_the_prediction_and_contacts_no_other_machines(
    served, tiny_run, deep, tmp_path, monkeypatch, capsys
):
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    _, out, _ = run(monkeypatch, capsys, tiny_run, deep, "--json", "--device", "cpu")
    (expected,) = json.loads(out)["images"]
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        except sync_api.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        visit, asked = browser.new_page(), []
        visit.on("request", lambda request: asked.append(request.url))
        visit.goto(served)
        visit.set_input_files("input[type=file]", str(deep))
        visit.get_by_text(expected["classes"][0]["name"], exact=True).first.wait_for()
        visit.get_by_text(expected["experts"][0]["name"], exact=True).first.wait_for()
        visit.wait_for_function("[...document.images].some(image => image.naturalWidth > 1000)")
        visit.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert asked and all(url.startswith((served, "data:", "blob:")) for url in asked), asked
