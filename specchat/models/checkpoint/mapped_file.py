"""Files that are mapped into memory, whose length is checked before each use.

The system ends a program that reads a lost page of a mapped file (SIGBUS). A file that is replaced under its name keeps
its pages; only a file that is cut short or overwritten in place loses them.
"""

import os
from pathlib import Path

from specchat.closing import Closeable
from specchat.models.checkpoint.json_file import fail_to_read
from specchat.models.checkpoint.safetensors import fail_truncated


class MappedFile(Closeable):
    """An open file that holds mapped bytes.

    Args:
        path: path of the file.
        end: bytes that the file must have, up to the end of the mapped ones.

    Raises:
        ModelError: the file cannot be opened.
    """

    def __init__(self, path: Path, end: int) -> None:
        self._path = path
        self._end = end
        try:
            self._file = path.open("rb", buffering=0)  # closes itself when it is dropped after an error
        except OSError as error:
            fail_to_read(path, error)

    @property
    def descriptor(self) -> int:
        """Descriptor of the open file."""
        return self._file.fileno()

    def check(self) -> None:
        """Check that the mapped bytes are still in the file; takes a microsecond.

        Raises:
            CorruptCheckpointError: the file was cut short.
        """
        length = os.fstat(self.descriptor).st_size
        if length < self._end:
            fail_truncated(self._path, self._end, length)

    def close(self) -> None:
        """Close the file; the mapping lives as long as its tensors."""
        self._file.close()
