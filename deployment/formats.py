"""The formats of an exported run: how to write a graph to a file, and how to run that file."""

import importlib.util
import io
import json
import logging
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from deployment.graph import OUTPUTS

Answer = Callable[[Tensor], tuple[Tensor, ...]]


class Format(ABC):
    """One format. packages: required in addition to torch. most: size limit of a file in bytes (None: no limit)."""

    packages: ClassVar[tuple[str, ...]] = ()
    most: ClassVar[int | None] = None

    @property
    def missing(self) -> list[str]:
        """The missing packages."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    @abstractmethod
    def encode(self, program: ExportedProgram, about: dict[str, Any]) -> bytes:
        """Write the file, with the metadata `about`. Raises what the exporter does."""

    @abstractmethod
    def opened(self, content: bytes) -> Answer:
        """The file as a function from uint8 images (B, 3, H, W) to OUTPUTS, in the runtime that other programs use."""


class Onnx(Format):
    """ONNX, by PyTorch's exporter. A file is one protocol buffer, which is limited to 2 GiB."""

    packages = ("onnx", "onnxscript", "onnxruntime")
    most = 2**31 - 2**20

    def encode(self, program: ExportedProgram, about: dict[str, Any]) -> bytes:
        import onnx

        with quiet():
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=["images"],
                output_names=list(OUTPUTS),
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            )
        proto = exported.model_proto
        _rename_batch(proto.graph)
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
        onnx.helper.set_model_props(proto, texts)
        return proto.SerializeToString()

    def opened(self, content: bytes) -> Answer:
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

        def answer(images: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.from_numpy(found) for found in session.run(list(OUTPUTS), {"images": images.numpy()}))

        return answer


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable, which PyTorch does not translate: ONNX's TopK over all entries; ties go to the lower index."""
    from onnxscript import opset18 as op

    size = op.Shape(values, start=dim, end=dim + 1 if dim != -1 else None)
    return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the messages of an exporter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _rename_batch(graph: Any) -> None:
    """Name the number of images "batch" in all shapes, instead of PyTorch's symbol."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", size.dim_param)


class Pt2(Format):
    """PyTorch's archive of an exported graph: torch.export.load runs it without the original code."""

    def encode(self, program: ExportedProgram, about: dict[str, Any]) -> bytes:
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(about)})
        return file.getvalue()

    def opened(self, content: bytes) -> Answer:
        with quiet():
            return torch.export.load(io.BytesIO(content)).module()


FORMATS: dict[str, Format] = {".onnx": Onnx(), ".pt2": Pt2()}
"""Formats by file ending."""
