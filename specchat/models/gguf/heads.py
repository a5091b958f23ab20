"""The MTP layers of a model in safetensors or GGUF files, whose numbers are those after the decoder's last layer.

A GGUF file of its own may hold the layer without the model.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from specchat.errors import ModelError
from specchat.models.checkpoint.gguf import is_mtp_alone, listed_files, open_gguf
from specchat.models.checkpoint.mtp import MtpPart, announces_mtp, find_mtp, layer_names
from specchat.models.gguf.metadata import Metadata


def announces_head(folder: Path) -> bool:
    """Return whether a configuration or a GGUF header speaks of an MTP layer; only the tensors tell whether it is here.

    Args:
        folder: folder of the model, or the one that stands for its GGUF files.
    """
    files = listed_files(folder)
    return announces_mtp(folder) if files is None else _is_counted(Metadata(open_gguf(files[0])))


def is_head_alone(folder: Path) -> bool:
    """Return whether the GGUF file that a folder stands for holds an MTP layer without the model that it is for."""
    files = listed_files(folder)
    return files is not None and Metadata(open_gguf(files[0])).is_head_alone


def heads_beside(folder: Path) -> Iterator[Path]:
    """Yield the GGUF files beside a model's own that hold MTP layers alone, the smallest first.

    Args:
        folder: folder of the model, or the one that stands for its GGUF files.
    """
    files = listed_files(folder)
    if files is None:
        return
    named = [file for file in files[0].parent.glob("*.gguf") if is_mtp_alone(file.name)]
    for file in sorted(named, key=lambda each: each.stat().st_size):
        with suppress(ModelError):  # a damaged file must not keep the model from running
            if Metadata(open_gguf(file)).is_head_alone:
                yield file


def _is_counted(metadata: Metadata) -> bool:
    return bool(metadata.integer("nextn_predict_layers", 0))


def find_head(folder: Path) -> MtpPart | None:
    """Return the MTP layer of a model; None without one.

    Only config.json and headers are read.

    Args:
        folder: folder of the model, or the one that stands for its GGUF files.

    Raises:
        CorruptCheckpointError, UnsupportedModelError: faults of headers.
    """
    files = listed_files(folder)
    if files is None:
        return find_mtp(folder)
    metadata = Metadata(open_gguf(files[0]))
    if not _is_counted(metadata):
        return None
    from specchat.models.gguf.tensors import open_tensors  # imports torch

    checkpoint = open_tensors(folder, with_head=True)
    layers = layer_names(checkpoint.tensors, metadata.num_layers)
    return MtpPart(checkpoint, layers) if layers else None
