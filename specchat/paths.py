"""Folders of specchat on this machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of packs and measured rates; the folder need not exist yet.

    SPECCHAT_CACHE_DIR overrides the platform's cache folder.
    """
    import platformdirs

    cache = os.environ.get("SPECCHAT_CACHE_DIR") or platformdirs.user_cache_dir("specchat", appauthor=False)
    return Path(cache).expanduser()


def state_folder() -> Path:
    """Return the folder of saved chats, prompt history and statistics.

    SPECCHAT_STATE_DIR overrides the platform's state folder.
    """
    import platformdirs

    chosen = os.environ.get("SPECCHAT_STATE_DIR") or platformdirs.user_state_dir("specchat", appauthor=False)
    return Path(chosen).expanduser()
