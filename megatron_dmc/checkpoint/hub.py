"""Models named by their Hugging Face Hub id: from the local cache, or downloaded into it.

The environment variables of `huggingface_hub` are honoured: HF_HUB_OFFLINE, HF_HOME, HF_HUB_CACHE, HF_TOKEN,
HF_ENDPOINT.
"""

import re
from pathlib import Path

from megatron_dmc.errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_CONFIGURATION = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*.jinja", "tokenization_*.py",
)  # fmt: skip
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "integrity.json")


def local_path(name: str | Path, *, revision: str | None = None, with_weights: bool = True) -> Path:
    """The local path of a model, or of a tokenizer.

    Args:
        name: a path, which is returned as it is; or, where there is none, an id as in "OWNER/MODEL".
        revision: branch, tag or commit of an id; default: the main branch.
        with_weights: False: download configuration and tokenizer only.

    Returns:
        the path, or the folder of the snapshot in the Hub's cache. A string that cannot be an id is
        returned as a path whether or not it exists.

    Raises:
        CheckpointError: there is no such model, it is not cached and cannot be downloaded, or it has no such
            revision.
    """
    path = Path(name)
    if path.exists() or not _ID.fullmatch(str(name)):
        if revision is not None:
            raise CheckpointError(
                f"revision {revision}: {name} is a path, and only models of the Hugging Face Hub have "
                "revisions; leave it out"
            )
        return path
    patterns = [*_CONFIGURATION, *_TOKENIZER, *(_WEIGHTS if with_weights else ())]
    return _snapshot(str(name), revision, patterns)


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as e:
        reason = (
            f"its owner asks for consent or a login; accept the terms at {constants.ENDPOINT}/{repo}, then "
            "run `hf auth login` or set HF_TOKEN"
        )
        raise CheckpointError(f"{repo}: {reason}") from e
    except errors.RepositoryNotFoundError as e:
        raise CheckpointError(
            f"{repo}: neither a path here nor a model at {constants.ENDPOINT}; correct the name, or for a "
            "private model run `hf auth login` or set HF_TOKEN"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise CheckpointError(
            f"{repo}: has no revision {revision}; give a branch, tag or commit of it"
        ) from e
    except Exception as e:  # the network's errors are of many kinds
        if constants.HF_HUB_OFFLINE:
            reason = f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} has no complete copy{at}"
            remedy = "download it once without HF_HUB_OFFLINE"
        else:
            reason = f"{constants.ENDPOINT} does not give it{at} ({_first_line(e)})"
            remedy = "check the connection"
        raise CheckpointError(
            f"{repo}: neither a path here nor in the Hub's cache: {reason}; {remedy}, or give a folder"
        ) from e


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
