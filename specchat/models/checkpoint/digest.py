"""Digests that tell whether two machines have the same weights, without reading all of them."""

import hashlib
import json
from pathlib import Path

from specchat.models.checkpoint.json_file import fail_to_read, read_json
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo, fail_truncated

# Bytes of each tensor that are read, from its middle, and most tensors that are.
_SAMPLE_BYTES = 4096
_MOST_SAMPLES = 4096
# Entries of config.json that say nothing about the model.
_REMARKS = ("_name_or_path", "transformers_version")


def weights_digest(folder: Path, checkpoint: Checkpoint) -> str:
    """Return a digest of the configuration, of all headers, and of a part of each tensor's bytes.

    A model that was trained further differs in nearly every value, so a part of each tensor tells. 46,000 tensors of
    single experts would take seconds, so of more than 4,096 tensors some are sampled, evenly.

    Args:
        folder: folder with config.json.
        checkpoint: tensors of the model.

    Raises:
        ModelError: a file cannot be read.
        CorruptCheckpointError: a file is shorter than its header says.
    """
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in _REMARKS}
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    keys = sorted(checkpoint.tensors)
    for key in keys:
        info = checkpoint.tensors[key]
        found.update(json.dumps([key, info.dtype, list(info.shape), info.nbytes]).encode())
    for key in keys[:: -(-len(keys) // _MOST_SAMPLES)]:
        found.update(_sample(checkpoint.tensors[key]))
    return found.hexdigest()


def _sample(info: TensorInfo) -> bytes:
    count = min(info.nbytes, _SAMPLE_BYTES)
    try:
        with info.file.open("rb") as file:
            file.seek(info.offset + (info.nbytes - count) // 2)
            data = file.read(count)
    except OSError as error:
        fail_to_read(info.file, error)
    if len(data) < count:
        fail_truncated(info.file, info.offset + info.nbytes, info.file.stat().st_size)
    return data
