"""The MTP layer of a model in safetensors or GGUF files, where its number is the one after the decoder's last layer."""

from pathlib import Path

from specchat.models.checkpoint.gguf import listed_files, open_gguf
from specchat.models.checkpoint.mtp import MtpPart, announces_mtp, find_mtp, layer_names
from specchat.models.gguf.config import num_layers
from specchat.models.gguf.metadata import Metadata


def announces_head(folder: Path) -> bool:
    """Return whether a configuration or a GGUF header speaks of an MTP layer; only the tensors tell whether it is here.

    Args:
        folder: folder of the model, or the one that stands for its GGUF files.
    """
    files = listed_files(folder)
    return announces_mtp(folder) if files is None else _is_counted(Metadata(open_gguf(files[0])))


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
    names = layer_names(checkpoint.tensors, num_layers(metadata))
    return None if names is None else MtpPart(checkpoint, names)
