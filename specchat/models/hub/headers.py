"""Headers of a model's weights on the hub: all sizes of its tensors, without their bytes.

Each file of weights gets a stand-in of the same size with the same header. The rest is zero and takes no space on the
disk.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from specchat.errors import ModelError
from specchat.models.checkpoint.gguf import check_header
from specchat.models.checkpoint.json_file import MODELOPT_FILE
from specchat.models.checkpoint.safetensors import INDEX_FILE
from specchat.models.hub.download import Download, silent_bars
from specchat.models.hub.errors import hub_errors
from specchat.records.model import ModelSource

# Files that are fetched at the same time: a large model has some hundreds.
_WORKERS = 8
_CONFIGS = ("config.json", MODELOPT_FILE)
# Bytes to fetch at once of a GGUF file, whose header holds the vocabulary: some MB.
_STEP = 1 << 20


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

    Args:
        download: model in safetensors or GGUF files.
        folder: existing folder for the files.

    Raises:
        ModelError: an unreachable or failing hub, or an invalid header.
    """
    if not download.files:
        configs = fetch_configs(download)
        for file in (configs / name for name in (*_CONFIGS, INDEX_FILE)):
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
    write = _write_gguf if download.files else _write_safetensors
    with hub_errors(download.ref), ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(lambda name: write(download, name, folder / name), download.files or download.weights):
            pass
    return ModelSource(name=download.ref.text, path=folder, revision=download.revision, headers_only=True)


def _write_safetensors(download: Download, name: str, file: Path) -> None:
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


def _write_gguf(download: Download, name: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        begin = _Beginning(download, name, stream)
        check_header(Path(name), begin, begin.num_bytes)
        stream.truncate(begin.num_bytes)


class _Beginning:
    """A file on the hub, which is fetched from its begin as far as it is read.

    Args:
        download: model of the file.
        name: file in the repository.
        copy: empty file; receives all that is fetched.

    Attributes:
        num_bytes: size of the file on the hub.
    """

    def __init__(self, download: Download, name: str, copy: BinaryIO) -> None:
        self._download, self._name, self._copy = download, name, copy
        self._fetched, self._position = bytearray(), 0
        self.num_bytes = _STEP  # until the hub tells
        self._fetch()

    def read(self, size: int, /) -> bytes:
        """Return the next bytes; fewer at the end of the file."""
        end = min(self._position + size, self.num_bytes)
        while len(self._fetched) < end:
            self._fetch()
        data = bytes(self._fetched[self._position : end])
        self._position = end
        return data

    def seek(self, offset: int, /) -> int:
        """Go to an offset from the begin, and return it."""
        self._position = offset
        return offset

    def _fetch(self) -> None:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public by their documentation
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        download, first = self._download, len(self._fetched)
        assert download.ref.repo_id is not None
        url = hf_hub_url(download.ref.repo_id, self._name, revision=download.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{first + _STEP - 1}"}
        answer = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        hf_raise_for_status(answer)
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if not total.isdigit() or not answer.content:
            raise ModelError(f"the hub does not send parts of {self._name}", hint="download it, and plan it then")
        self.num_bytes = int(total)
        self._fetched += answer.content
        self._copy.write(answer.content)
