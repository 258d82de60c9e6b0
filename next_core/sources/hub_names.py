"""Names of the Hugging Face Hub, resolved to folders: from its cache, else from the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from next_core.errors import ConfigError, describe
from next_core.process.optional_packages import import_optional

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")
"""``owner/name`` or ``owner/name@revision``. A file or folder of that path takes precedence."""
UNREAD = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*"]
"""Files of a model that nothing here reads: other formats, most of them pickles."""


def hub_folder(name: str, kind: Literal["model", "dataset"] = "model", online: bool = True) -> Path:
    """Return the folder of a model or dataset in the cache of the Hub, downloaded first where it is not there.

    ``HF_HUB_OFFLINE`` and ``HF_HOME`` have the meaning that huggingface_hub gives them. Raises ``ConfigError``.
    """
    import_optional("huggingface_hub", "trl")
    from huggingface_hub import snapshot_download

    ignored = UNREAD if kind == "model" else None
    repository, _, revision = name.partition("@")
    problem = ""
    for local in (True, False) if online else (True,):
        try:
            folder = Path(
                snapshot_download(
                    repository,
                    repo_type=kind,
                    revision=revision or None,
                    ignore_patterns=ignored,
                    local_files_only=local,
                )
            )
        except Exception as error:  # of huggingface_hub, or of its client for HTTP
            problem = describe(error)
            continue
        # The cache does not know what is missing of a model of which single files were downloaded.
        if kind == "dataset" or any(folder.glob("*.safetensors")):
            return folder
        problem = f"{folder} holds no safetensors"
    download = f"hf download {repository} --repo-type {kind}" + (f" --revision {revision}" if revision else "")
    raise ConfigError(
        f"'{name}' is no path here, and as a {kind} of the Hugging Face Hub it is not in the cache and could not be "
        f"downloaded ({problem}); run `{download}` where there is a network, or give a path",
        kind="config-missing-file",
    )
