"""Headers of a checkpoint on the hub: all sizes of its tensors, without their bytes."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from specchat.models.checkpoint.json_file import MODELOPT_FILE
from specchat.models.checkpoint.safetensors import INDEX_FILE
from specchat.models.hub.download import Download, silent_bars
from specchat.models.hub.errors import hub_errors
from specchat.records.model import ModelSource

# Files that are fetched at the same time: a large model has some hundreds.
_WORKERS = 8
_CONFIGS = ("config.json", MODELOPT_FILE)


def fetch_configs(download: Download) -> Path:
    """Fetch the files that describe a model, and return their folder in the cache.

    Raises:
        ModelError: an unreachable or failing hub.
    """
    from huggingface_hub import snapshot_download

    ref = download.ref
    assert ref.repo_id is not None
    with hub_errors(ref):
        return Path(
            snapshot_download(
                ref.repo_id,
                revision=download.revision,
                allow_patterns=list(_CONFIGS),
                tqdm_class=silent_bars(),
            )
        )


def fetch_headers(download: Download, folder: Path) -> ModelSource:
    """Fetch the configuration and the headers of the weights of a model.

    Each weight file gets a stand-in of the same size with the same tensors, all zero. It takes no space on the disk.

    Args:
        download: model in safetensors.
        folder: existing folder for the files.

    Raises:
        ModelError: an unreachable or failing hub.
    """
    configs = fetch_configs(download)
    for file in (configs / name for name in (*_CONFIGS, INDEX_FILE)):
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    with hub_errors(download.ref), ThreadPoolExecutor(_WORKERS) as pool:
        list(pool.map(lambda name: _write_stand_in(download, name, folder / name), download.weights))
    return ModelSource(name=download.ref.text, path=folder, revision=download.revision, headers_only=True)


def _write_stand_in(download: Download, name: str, file: Path) -> None:
    from huggingface_hub import HfApi

    assert download.ref.repo_id is not None
    found = HfApi().parse_safetensors_file_metadata(download.ref.repo_id, name, revision=download.revision)
    entries = {
        key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for key, info in found.tensors.items()
    }
    header = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + max((info.data_offsets[1] for info in found.tensors.values()), default=0))
