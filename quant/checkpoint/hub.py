"""Packed checkpoints in the hub's cache: the files that verifying needs and that a loader did not download.

`from_pretrained` of a hub name in transformers or diffusers downloads config and weights only. The rest of the same
commit is fetched here, into the same folder of the cache, which is then verified as any other. A quantizer is not told
how `from_pretrained` was called: offline is `HF_HUB_OFFLINE`, a token that of `hf auth login` or `HF_TOKEN`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download

from quant.errors import CheckpointError
from quant.models.source import first_line


def fetch(folder: Path, names: Iterable[str]) -> None:
    """Downloads those of the named files that a hub snapshot lacks. Any other folder is left as it is.

    Raises:
        CheckpointError: the hub may not be asked, or does not give one.
    """
    commit = next((at for at in (folder, *folder.parents) if at.parent.match("models--*/snapshots")), None)
    if commit is None:
        return
    home, inside = commit.parent.parent, folder.relative_to(commit)
    repo = home.name.removeprefix("models--").replace("--", "/")
    for name in names:
        if (folder / name).exists():
            continue
        try:
            hf_hub_download(repo, (inside / name).as_posix(), revision=commit.name, cache_dir=home.parent)
        except Exception as error:  # hub errors come from three libraries
            raise CheckpointError(
                f"{repo}: {(inside / name).as_posix()} is not in the hub's cache, and the hub did not give it "
                f"({first_line(error)}). A packed checkpoint is verified before use: be online, or download the whole "
                f"repository first, with `hf download {repo} --revision {commit.name}`"
            ) from None
