"""What is checked in a file of tensors that somebody else may have written, before PyTorch reads it.

`torch.load(weights_only=True)` runs no code, but it does not notice flipped bits, and what a file claims decides how
much memory it takes.
"""

import pickletools
import zipfile
from pathlib import Path

MODULES = ("torch", "collections")  # what tensors, and the dictionaries that hold them, are made of


def check_archive(path: Path) -> None:
    """Raise ValueError (or what zipfile raises) unless `path` is a whole archive, as torch.save writes it.

    Whole: every record has its checksum. Nothing is compressed or claimed to be larger than the file, and the pickled
    part builds tensors and plain values only.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("a record is compressed")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records claim to be larger than the file")
        if corrupt := archive.testzip():
            raise ValueError(f"record {corrupt} is damaged")
        for record in records:
            if record.filename.endswith(".pkl"):
                _check_pickle(archive.read(record))


def _check_pickle(content: bytes) -> None:
    for operation, argument, _ in pickletools.genops(content):
        if operation.name == "STACK_GLOBAL":  # torch.save writes an older protocol
            raise ValueError("it names what it needs in an unexpected way")
        if operation.name in ("GLOBAL", "INST") and str(argument).split(".")[0].split(" ")[0] not in MODULES:
            raise ValueError(f"it asks for {str(argument).replace(' ', '.')}")
