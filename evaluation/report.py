"""evaluation/report.html: an evaluation as a single page that opens offline, including figures."""

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from common.files import write_text
from common.meter import duration
from config.config import Config
from evaluation.figures import Drawing
from evaluation.report_tables import percent, tables_of
from evaluation.run_cost import si
from storage.folder import RunFolder


def write_report(run: RunFolder, config: Config, results: dict[str, Any], drawings: list[Drawing]) -> Path:
    """Write report.html from the content of metrics.json and the figures on disk. Returns its path."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = templates.get_template("report.html.j2").render(
        name=run.path.resolve().name,
        subtitle=f"{config.data.name}, {config.backbone.name}, {_rule(config)}",
        origin=_origin(results),
        remarks=[line for line in (results.get("state"), results.get("dense_twin", {}).get("text")) if line],
        headline=_headline(results),
        figures=[_embed(drawing) for drawing in drawings],
        tables=[table for table in tables_of(results) if table.rows],
        config=_sections(config.to_dict()),
        environment=results["environment"],
    )
    write_text(run.report, page)
    return run.report


def _origin(results: dict[str, Any]) -> str:
    """The run that this one starts from, in words; empty if it starts from random weights."""
    if not (init := results.get("init")):
        return ""
    common = f"{len(init['classes'])} of {len(results['class_names'])} classes in common"
    scores = [
        f"macro-F1 {percent(init[key])} on {which}"
        for key, which in (("macro_f1_old_classes", "these"), ("macro_f1_new_classes", "the new ones"))
        if init.get(key) is not None
    ]
    return f"Starts from {init['run']}, epoch {init['epoch']}, {', '.join([common, *scores])}."


def _rule(config: Config) -> str:
    return "dense twin" if config.twin_of else f"{config.router.kind} top-{config.router.top_k}"


def _embed(drawing: Drawing) -> dict[str, Any]:
    """A figure in the page, at 100 pixels per inch."""
    data = drawing.path.read_bytes()
    with Image.open(drawing.path) as image:
        width = round(image.width * 100 / 150)
    return {
        "caption": drawing.caption,
        "alt": f"{drawing.name.replace('_', ' ')}: {drawing.caption}",
        "width": width,
        "data": base64.b64encode(data).decode("ascii"),
    }


def _headline(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, explanation) of the single values."""
    special, gate = results["specialisation"], results["gate"]
    where = f", in block {results['most_specialised_block']}" if "blocks" in results else ""
    z_score = "" if special["z_score"] is None else f", {special['z_score']:.0f} s.d. above chance"
    single_expert = len(results["experts"]) == 1  # a dense twin has no routing
    routing_cards = [
        ("balance", f"{results['entropy']:.3f}", f"entropy of the load, 1 is even; CV {results['cv']:.2f}"),
        (
            "specialisation",
            f"{special['normalised']:.3f}",
            f"mutual information of class and expert over log E{z_score} (p {special['p_value']:.3f}){where}",
        ),
    ]
    shown = [
        ("macro-F1", percent(results["macro_f1"]), f"{results['images']:,} test images"),
        ("accuracy", percent(results["accuracy"]), f"cross-entropy {results['loss']:.3f} nats"),
        *([] if single_expert else routing_cards),
        ("calibration error", percent(results["expected_calibration_error"]), "expected, 15 bins; 0 is best"),
    ]
    if gate["boundary_share"] is not None:
        reading = "of the images almost went to another expert"
        if gate["boundary_accuracy"] is not None and gate["elsewhere_accuracy"] is not None:
            near, rest = percent(gate["boundary_accuracy"]), percent(gate["elsewhere_accuracy"])
            reading += f"; accuracy {near} on these, {rest} on the others"
        shown.append(("near the boundary", percent(gate["boundary_share"]), reading))
    if not single_expert:
        reading = f"mean over the {'tokens' if 'blocks' in results else 'images'}; 1: no preference, 0: certain"
        shown.append(("gate entropy", f"{gate['entropy_mean']:.2f}", reading))
    shown.append(_cost_card(results["cost"]))
    if "superclass_accuracy" in results:
        shown.insert(
            2, ("superclass accuracy", percent(results["superclass_accuracy"]), "correct superclass, any class")
        )
    return shown


def _cost_card(cost: dict[str, Any]) -> tuple[str, str, str]:
    reading = f"{si(cost['active_parameters'])} of {si(cost['trained_parameters'])} trained parameters active"
    if cost["training_seconds"] is not None:
        reading += f"; trained in {duration(cost['training_seconds'])}"
    flops = cost["flops"] or cost["head_flops"]
    return "FLOPs per image" if cost["flops"] else "FLOPs per image, without the backbone", si(flops), reading


def _sections(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The configuration as (section, [(field, value)]), fields without a section first."""
    plain = [(key, _shown(value)) for key, value in config.items() if not isinstance(value, dict)]
    nested = {key: value for key, value in config.items() if isinstance(value, dict)}
    return [("run", plain)] + [(key, [(k, _shown(v)) for k, v in value.items()]) for key, value in nested.items()]


def _shown(value: Any) -> str:
    """A value as YAML and JSON write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
