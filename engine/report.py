"""evaluation/report.html: one evaluation as a single page that opens offline, figures and all."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.routing import top_classes
from engine.config import Config
from engine.figures import Drawing
from engine.run_folder import RunFolder, write_atomically

TITLES = {
    "training_curves": "Training",
    "load_over_time": "Load over time",
    "expert_by_class": "Experts by class",
    "expert_load": "Load of the experts",
    "expert_load_one_batch": "Load of one batch",
    "expert_worth": "Value and cost of the experts",
    "feature_map": "Experts in feature space",
    "samples": "Test samples",
    "superclass_confusion": "Confusion of the superclasses",
    "confused_pairs": "Most confused pairs",
    "reliability": "Reliability",
}
CO_ACTIVATION = 16  # experts up to which the table of pairs is shown


@dataclass(frozen=True)
class Table:
    """A table of the page. text: the columns, by their header, that hold words. folded: shown when clicked."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    text: tuple[str, ...] = ()
    folded: bool = False


def write_report(run: RunFolder, config: Config, results: dict[str, Any], drawings: list[Drawing]) -> Path:
    """Write report.html from what metrics.json holds and the figures on the disk. Returns its path."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = templates.get_template("report.html.j2").render(
        name=run.path.resolve().name,
        subtitle=f"{config.data.name}, {config.backbone.name}, {config.router.kind} top-{config.router.top_k}",
        headline=_headline(results),
        figures=[
            {
                "title": TITLES[drawing.name],
                "caption": drawing.caption,
                "data": base64.b64encode(drawing.path.read_bytes()).decode("ascii"),
            }
            for drawing in drawings
        ],
        tables=[table for table in _tables(results) if table.rows],
        config=_sections(config.to_dict()),
        environment=results["environment"],
    )
    write_atomically(run.report, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return run.report


def percent(value: float | None, digits: int = 1) -> str:
    """0.1234 as "12.3 %", and a dash for what is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def si(value: float) -> str:
    """1234567 as "1.23 M"."""
    for unit in ("", " k", " M"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} G"


def _headline(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, value, how to read it) of the single figures."""
    special, gate = results["specialisation"], results["gate"]
    z_score = "" if special["z_score"] is None else f", {special['z_score']:.0f} s.d. above chance"
    shown = [
        ("macro-F1", percent(results["macro_f1"]), f"{results['images']:,} test images"),
        ("accuracy", percent(results["accuracy"]), f"cross-entropy {results['loss']:.3f} nats"),
        ("balance", f"{results['entropy']:.3f}", f"entropy of the load, 1 is even; CV {results['cv']:.2f}"),
        (
            "specialisation",
            f"{special['normalised']:.3f}",
            f"mutual information of class and expert over log E{z_score} (p {special['p_value']:.3f})",
        ),
        ("calibration error", percent(results["expected_calibration_error"]), "expected, 15 bins; 0 is best"),
    ]
    if gate["boundary_share"] is not None:
        reading = "images that the gate all but sent elsewhere"
        if gate["boundary_accuracy"] is not None and gate["elsewhere_accuracy"] is not None:
            reading += f": {percent(gate['boundary_accuracy'])} right, elsewhere {percent(gate['elsewhere_accuracy'])}"
        shown.append(("near the boundary", percent(gate["boundary_share"]), reading))
    shown.append(("gate entropy", f"{gate['entropy_mean']:.2f}", "of a mean image; 1 is no preference, 0 is certain"))
    if "superclass_accuracy" in results:
        shown.insert(2, ("superclass accuracy", percent(results["superclass_accuracy"]), "right superclass, any class"))
    return shown


def _tables(results: dict[str, Any]) -> list[Table]:
    tables = [_expert_table(results), _worth_table(results), _co_activation(results)]
    if "superclass_names" in results:
        rows = zip(results["superclass_names"], results["expert_by_superclass"], strict=True)
        tables.append(_by_group("Experts by superclass", "superclass", rows, results["experts"]))
    names = results["class_names"]
    rows = zip(names, results["expert_by_class"], results["expert_by_class_weight"], strict=True)
    scores = [results["per_class"][name] for name in names]
    tables.append(
        Table(
            title="Classes",
            note="Sorted by F1, the hardest first. For each expert: share of the assignments / of the gate's weight.",
            header=["class", "F1", "precision", "recall", "images", *results["experts"]],
            folded=len(names) > 20,
            rows=[
                [
                    name,
                    *(percent(score[key]) for key in ("f1", "precision", "recall")),
                    str(score["support"]),
                    *(f"{100 * share:.0f} / {100 * weight:.0f} %" for share, weight in zip(by, heavy, strict=True)),
                ]
                for score, (name, by, heavy) in sorted(
                    zip(scores, rows, strict=True), key=lambda pair: (pair[0]["f1"], pair[1][0])
                )
            ],
        )
    )
    return tables


def _expert_table(results: dict[str, Any]) -> Table:
    rows = []
    for expert, label in enumerate(results["experts"]):
        favourites = top_classes(results["expert_by_class"], results["class_names"], expert, 5)
        hardest = results["expert_hardest_classes"][expert]
        rows.append(
            [
                label,
                percent(results["expert_load"][expert]),
                percent(results["expert_importance"][expert]),
                percent(results["expert_accuracy"][expert]),
                percent(results["expert_confidence"][expert]),
                ", ".join(f"{name} {100 * share:.0f} %" for name, share in favourites),
                ", ".join(f"{row['class']} {100 * row['accuracy']:.0f} %" for row in hardest),
            ]
        )
    return Table(
        title="Experts",
        note="Accuracy and confidence are those of the whole mixture on the images that the expert had a part in. "
        "Serves most: share of the class's assignments. Hardest: accuracy on the class, of 5 images or more.",
        header=["expert", "load", "gate weight", "accuracy", "confidence", "serves most", "hardest"],
        rows=rows,
        text=("serves most", "hardest"),
    )


def _worth_table(results: dict[str, Any]) -> Table:
    rows = []
    for expert, row in enumerate(results["expert_worth"]):
        if "macro_f1_change" in row:
            heirs = sorted(enumerate(row["taken_over_by"]), key=lambda item: -item[1])[:3]
            change = f"{100 * row['macro_f1_change']:+.2f} ± {100 * row['macro_f1_deviation']:.2f}"
            rows.append(
                [
                    results["experts"][expert],
                    change,
                    percent(row["answers_changed"]),
                    f"{row['parameters']:,}",
                    f"{row['bytes'] / 2**20:.2f} MiB",
                    f"{si(row['flops'])}FLOP",
                    f"{si(row['flops_saved'])}FLOP",
                    ", ".join(f"expert {heir} {100 * share:.0f} %" for heir, share in heirs if share > 0),
                ]
            )
    return Table(
        title="What each expert is worth",
        note="Each expert removed in turn, its images sent to the gate's next choice, nothing trained again. "
        "macro-F1 in points, ± one standard deviation over bootstrap resamples of the test images.",
        header=[
            "without expert",
            "macro-F1",
            "answers changed",
            "parameters saved",
            "memory saved",
            "cost of an image there",
            "saved a mean image",
            "taken over by",
        ],
        rows=rows,
        text=("taken over by",),
    )


def _co_activation(results: dict[str, Any]) -> Table:
    table, labels = results["co_activation"], results["experts"]
    shown = 1 < len(labels) <= CO_ACTIVATION
    return Table(
        title="Experts that work together",
        note="Of the images of the expert on the left, the share that the expert above sees as well.",
        header=["expert", *labels],
        rows=[
            [label, *("" if e == other else percent(count / max(1, row[e]), 0) for other, count in enumerate(row))]
            for e, (label, row) in enumerate(zip(labels, table, strict=True))
            if shown
        ],
    )


def _by_group(title: str, kind: str, rows, labels: list[str]) -> Table:
    return Table(
        title=title,
        note="Share of the assignments.",
        header=[kind, *labels],
        rows=[[name, *(percent(share, 0) for share in shares)] for name, shares in rows],
    )


def _sections(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The configuration as (section, [(field, value)]), the fields that have no section first."""
    plain = [(key, str(value)) for key, value in config.items() if not isinstance(value, dict)]
    nested = {key: value for key, value in config.items() if isinstance(value, dict)}
    return [("run", plain)] + [(key, [(k, str(v)) for k, v in value.items()]) for key, value in nested.items()]
