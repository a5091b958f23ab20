"""Folders of specchat on this machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where packs and measured rates lie; SPECCHAT_CACHE_DIR overrides the platform's folder. It need not exist yet."""
    import platformdirs

    cache = os.environ.get("SPECCHAT_CACHE_DIR") or platformdirs.user_cache_dir("specchat", appauthor=False)
    return Path(cache).expanduser()


def state_folder() -> Path:
    """Where chats, typed lines and statistics are kept: SPECCHAT_STATE_DIR, or the platform's folder for them."""
    import platformdirs

    chosen = os.environ.get("SPECCHAT_STATE_DIR") or platformdirs.user_state_dir("specchat", appauthor=False)
    return Path(chosen).expanduser()
