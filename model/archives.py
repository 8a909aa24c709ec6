"""Checks of a file of tensors from an untrusted source, before PyTorch reads it.

`torch.load(weights_only=True)` runs no code, but it does not detect flipped bits, and a small file may claim a large
amount of memory.
"""

import pickletools
import zipfile
from pathlib import Path

MODULES = ("torch", "collections")  # the globals that pickled tensors and state dicts need


def check_archive(path: Path) -> None:
    """Raise ValueError (or what zipfile raises) unless `path` is an intact archive of torch.save.

    Every record must match its checksum, nothing may be compressed or claim to be larger than the file, and the pickle
    may build only tensors and plain values.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("a record is compressed")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records claim to be larger than the file")
        if corrupt := archive.testzip():
            raise ValueError(f"record {corrupt} is corrupt")
        for record in records:
            if record.filename.endswith(".pkl"):
                _check_pickle(archive.read(record))


def _check_pickle(content: bytes) -> None:
    for operation, argument, _ in pickletools.genops(content):
        if operation.name == "STACK_GLOBAL":  # torch.save writes an older protocol
            raise ValueError("its pickle has an unexpected form")
        if operation.name in ("GLOBAL", "INST") and str(argument).split(".")[0].split(" ")[0] not in MODULES:
            raise ValueError(f"its pickle needs {str(argument).replace(' ', '.')}")
