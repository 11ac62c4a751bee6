"""Called at the end of every `import torch` (entry-point group torch.backends): keep it cheap."""

import os


def autoload() -> None:
    """Serves the backend names in FIREFLY_INSTALL_AS (comma-separated), so that a trainer needs no change."""
    names = [name.strip() for name in os.environ.get("FIREFLY_INSTALL_AS", "").split(",") if name.strip()]
    if names:
        from .backend import install_as

        install_as(*names)
